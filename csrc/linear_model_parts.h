// What every computation on the Hessian of a linear model is made of: the product, one block of samples after
// another.
#pragma once

#include <algorithm>
#include <vector>

#include "dtypes.h"
#include "linear_model.h"
#include "tiles.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

constexpr int64_t kColumns = 96;     // of one task; a multiple of every tile's width
constexpr int64_t kSamples = 12;     // of one task; a multiple of every tile's height
constexpr int64_t kElements = 4096;  // of one task of an update
// Bytes of inputs in a block, for each thread: they are read twice, the second time from the cache.
constexpr int64_t kBlockBytes = int64_t{1} << 18;

int64_t tasks(int64_t count, int64_t each) { return (count + each - 1) / each; }

template <class T>
class Parts {
 protected:
  Parts(const LinearModel& model, int threads)
      : model_(model),
        threads_(threads),
        inputs_(static_cast<const T*>(model.inputs)),
        decay_(static_cast<const T*>(model.decay)),
        rows_(model.batch * model.outputs) {
    const int64_t row_bytes = std::max<int64_t>(1, model.features) * static_cast<int64_t>(sizeof(T));
    const int64_t block = std::max(kSamples, threads * kBlockBytes / row_bytes / kSamples * kSamples);
    block_ = std::min(model.samples, block);
  }

  // Before the first product.
  void allocate() { outputs_.resize(rows_ * block_); }

  // product += (H - decay) state, for vectors with the rows `to` and `from`; all threads of a team call it.
  void multiply(const T* state, const std::vector<T*>& from, T* product, const std::vector<T*>& to) {
    T* const u = outputs_.data();
    const int64_t n = model_.samples, chunks = tasks(model_.features, kColumns);
    for (int64_t first = 0; first < n; first += block_) {
      const int64_t count = std::min(block_, n - first);
#pragma omp for schedule(static)
      for (int64_t task = 0; task < tasks(count, kSamples); ++task) {
        const int64_t here = task * kSamples, some = std::min(kSamples, count - here);
        dots(row(first + here), model_.input_stride, some, from.data(), rows_, model_.features, u + here,
             block_);
        if (model_.bias >= 0) add_bias(state, u + here, block_, some);
        curve(u + here, block_, first + here, some);
      }
#pragma omp for schedule(static)
      for (int64_t chunk = 0; chunk <= chunks; ++chunk) {
        const int64_t column = chunk * kColumns;
        if (chunk == chunks) {
          if (model_.bias >= 0) sum_bias(u, block_, count, product);
        } else {
          add_products(to.data(), rows_, u, block_, row(first), model_.input_stride, count, column,
                       std::min(column + kColumns, model_.features));
        }
      }
    }
  }

  const T* row(int64_t sample) const { return inputs_ + sample * model_.input_stride; }

  // The rows of the weights in `state`, right-hand side after right-hand side.
  std::vector<T*> rows_of(T* state) const {
    std::vector<T*> rows(rows_);
    for (int64_t r = 0; r < rows_; ++r) {
      rows[r] = state + r / model_.outputs * model_.size + r % model_.outputs * model_.features;
    }
    return rows;
  }

  void add_bias(const T* state, T* u, int64_t stride, int64_t count) const {
    for (int64_t r = 0; r < rows_; ++r) {
      const T bias = state[r / model_.outputs * model_.size + model_.bias + r % model_.outputs];
      for (int64_t m = 0; m < count; ++m) u[r * stride + m] += bias;
    }
  }

  void sum_bias(const T* g, int64_t stride, int64_t count, T* product) const {
    for (int64_t r = 0; r < rows_; ++r) {
      T& sum = product[r / model_.outputs * model_.size + model_.bias + r % model_.outputs];
      for (int64_t m = 0; m < count; ++m) sum += g[r * stride + m];
    }
  }

  // u <- the loss's Hessian in the outputs times u, for samples [first, first + count), at most kColumns.
  void curve(T* u, int64_t stride, int64_t first, int64_t count) const {
    const int64_t k = model_.outputs, padded = model_.padded_samples;
    const T* const curvature = static_cast<const T*>(model_.curvature) + first;
    const T* const probabilities = static_cast<const T*>(model_.probabilities);
    T mean[kColumns] = {};
    for (int64_t b = 0; b < model_.batch; ++b) {
      T* const here = u + b * k * stride;
      if (probabilities != nullptr) {
        std::fill(mean, mean + count, T(0));
        for (int64_t c = 0; c < k; ++c) {
          const T* const q = probabilities + first + c * padded;
          const T* const from = here + c * stride;
#pragma omp simd
          for (int64_t m = 0; m < count; ++m) mean[m] += q[m] * from[m];
        }
      }
      for (int64_t c = 0; c < k; ++c) {
        const T* const factor = curvature + c * padded;
        T* const to = here + c * stride;
#pragma omp simd
        for (int64_t m = 0; m < count; ++m) to[m] = factor[m] * (to[m] - mean[m]);
      }
    }
  }

  // The squared norm of one flat vector, and 1 if something in it is not finite.
  void measure(const T* vector, double* squared, double* bad) const {
    double sum = 0, finite = 0;  // `finite` stays zero unless some element is NaN or infinite
#pragma omp simd reduction(+ : sum, finite)
    for (int64_t i = 0; i < model_.size; ++i) {
      const double element = static_cast<double>(vector[i]);
      sum += element * element;
      finite += element * 0.0;
    }
    *squared = sum;
    *bad = finite == 0 ? 0.0 : 1.0;
  }

  const LinearModel& model_;
  const int threads_;
  const T* const inputs_;
  const T* const decay_;
  const int64_t rows_;

 private:
  int64_t block_;
  std::vector<T> outputs_;
};

}  // namespace
}  // namespace HVP_VARIANT
}  // namespace hvp
