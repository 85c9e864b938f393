// Layer and root-mean-square normalization of rows, compiled once for each instruction set. A row stays in
// the cache between the pass that makes its sums and the one that makes its results.
#include <algorithm>
#include <cmath>
#include <vector>

#include "dtypes.h"
#include "normalization.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

constexpr int64_t kBlock = 512;  // elements of one partial sum
constexpr int64_t kRows = 32;    // rows of one task, and of one partial sum of the weight's derivatives

template <class T>
class NormalizedRows {
 public:
  explicit NormalizedRows(const Normalization& given)
      : given_(given),
        n_(given.channels),
        weight_(filled(given.weight, 1)),
        bias_(filled(given.bias, 0)),
        tangent_weight_(filled(given.tangent_weight, 0)),
        tangent_bias_(filled(given.tangent_bias, 0)),
        tasks_((given.samples + kRows - 1) / kRows) {
    if (given.level != Level::kValue) for_weight_.assign(static_cast<size_t>(tasks_ * n_), T(0));
    if (given.level == Level::kBackward) for_bias_ = for_weight_;
  }

  void run(int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < tasks_; ++task) {
      const int64_t end = std::min((task + 1) * kRows, given_.samples);
      for (int64_t row = task * kRows; row < end; ++row) {
        if (given_.level == Level::kValue) {
          value(row);
        } else if (given_.level == Level::kBackward) {
          backward(row, for_weight_.data() + task * n_, for_bias_.data() + task * n_);
        } else {
          double_backward(row, for_weight_.data() + task * n_);
        }
      }
    }
    add_up(for_weight_, given_.weight_product);
    add_up(for_bias_, given_.bias_product);
  }

 private:
  std::vector<T> filled(const void* given, T otherwise) const {
    const T* const from = static_cast<const T*>(given);
    return from == nullptr ? std::vector<T>(static_cast<size_t>(n_), otherwise)
                           : std::vector<T>(from, from + n_);
  }

  const T* row_of(const void* tensor, int64_t row) const { return static_cast<const T*>(tensor) + row * n_; }
  T* row_of(void* tensor, int64_t row) const { return static_cast<T*>(tensor) + row * n_; }
  double inverse(int64_t row) const { return 1 / std::sqrt(given_.variance[row] + given_.eps); }

  void value(int64_t row) const {
    const T* const x = row_of(given_.input, row);
    T* const out = row_of(given_.output, row);
    double mean = 0, squares = 0;
    for (int64_t first = 0; first < n_ && given_.centred; first += kBlock) {
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = first; i < std::min(first + kBlock, n_); ++i) sum += x[i];
      mean += static_cast<double>(sum);
    }
    mean /= static_cast<double>(n_);  // 0 if not centred
    const T shift = static_cast<T>(mean);
    double away = 0;
    for (int64_t first = 0; first < n_; first += kBlock) {
      T sum = 0, square = 0;
#pragma omp simd reduction(+ : sum, square)
      for (int64_t i = first; i < std::min(first + kBlock, n_); ++i) {
        const T centred = x[i] - shift;
        sum += centred;
        square += centred * centred;
      }
      away += static_cast<double>(sum);
      squares += static_cast<double>(square);
    }
    away = given_.centred ? away / static_cast<double>(n_) : 0;
    given_.mean[row] = static_cast<double>(shift) + away;
    given_.variance[row] = std::max(0.0, squares / static_cast<double>(n_) - away * away);
    const T centre = static_cast<T>(given_.mean[row]), rest = rounded_off(row),
            r = static_cast<T>(inverse(row));
    const T *const w = weight_.data(), *const b = bias_.data();
#pragma omp simd
    for (int64_t i = 0; i < n_; ++i) out[i] = (x[i] - centre - rest) * r * w[i] + b[i];
  }

  void backward(int64_t row, T* for_weight, T* for_bias) const {
    const T *const x = row_of(given_.input, row), *const g = row_of(given_.grad, row);
    const T* const w = weight_.data();
    T* const out = row_of(given_.input_product, row);
    const T mean = static_cast<T>(given_.mean[row]), rest = rounded_off(row),
            r = static_cast<T>(inverse(row));
    double h_sum = 0, hx_sum = 0;
    for (int64_t first = 0; first < n_; first += kBlock) {
      T h = 0, hx = 0;
#pragma omp simd reduction(+ : h, hx)
      for (int64_t i = first; i < std::min(first + kBlock, n_); ++i) {
        const T normal = (x[i] - mean - rest) * r, weighted = g[i] * w[i];
        h += weighted;
        hx += weighted * normal;
        for_weight[i] += g[i] * normal;
        for_bias[i] += g[i];
      }
      h_sum += static_cast<double>(h);
      hx_sum += static_cast<double>(hx);
    }
    const T h = mean_of(h_sum), hx = static_cast<T>(hx_sum / static_cast<double>(n_));
#pragma omp simd
    for (int64_t i = 0; i < n_; ++i) out[i] = r * (g[i] * w[i] - h - (x[i] - mean - rest) * r * hx);
  }

  void double_backward(int64_t row, T* for_weight) const {
    const T *const x = row_of(given_.input, row), *const g = row_of(given_.grad, row);
    const T* const t = row_of(given_.tangent, row);
    const T *const w = weight_.data(), *const tw = tangent_weight_.data(), *const tb = tangent_bias_.data();
    T* const for_grad = row_of(given_.output, row);
    T* const out = row_of(given_.input_product, row);
    const T mean = static_cast<T>(given_.mean[row]), rest = rounded_off(row),
            r = static_cast<T>(inverse(row));
    double sums[7] = {};
    for (int64_t first = 0; first < n_; first += kBlock) {
      T h = 0, hx = 0, s = 0, sx = 0, sh = 0, k = 0, kx = 0;
#pragma omp simd reduction(+ : h, hx, s, sx, sh, k, kx)
      for (int64_t i = first; i < std::min(first + kBlock, n_); ++i) {
        const T normal = (x[i] - mean - rest) * r, weighted = g[i] * w[i], turned = g[i] * tw[i];
        h += weighted;
        hx += weighted * normal;
        s += t[i];
        sx += t[i] * normal;
        sh += t[i] * weighted;
        k += turned;
        kx += turned * normal;
      }
      const T all[7] = {h, hx, s, sx, sh, k, kx};
      for (int q = 0; q < 7; ++q) sums[q] += static_cast<double>(all[q]);
    }
    const double count = static_cast<double>(n_);
    const double none = given_.centred ? 1 : 0;
    const double h = none * sums[0] / count, hx = sums[1] / count, s = none * sums[2] / count;
    const double sx = sums[3] / count, sh = sums[4] / count, k = none * sums[5] / count, kx = sums[6] / count;
    const double inverse_root = inverse(row), squared = inverse_root * inverse_root;
    const T t_mean = static_cast<T>(s), tx = static_cast<T>(sx);
    const T of_tangent = static_cast<T>(-squared * hx), of_h = static_cast<T>(-squared * sx);
    const T of_normal = static_cast<T>(-(inverse_root * kx + squared * (sh - h * s - 3 * hx * sx)));
    const T constant = static_cast<T>(-inverse_root * k + squared * (hx * s + sx * h));
#pragma omp simd
    for (int64_t i = 0; i < n_; ++i) {
      const T normal = (x[i] - mean - rest) * r, projected = r * (t[i] - t_mean - normal * tx),
              gradient = g[i];
      for_weight[i] += gradient * projected;
      for_grad[i] = w[i] * projected + tw[i] * normal + tb[i];
      out[i] =
          r * tw[i] * gradient + of_tangent * t[i] + of_h * (w[i] * gradient) + of_normal * normal + constant;
    }
  }

  // What the rounding of the mean has left out.
  T rounded_off(int64_t row) const {
    return static_cast<T>(given_.mean[row] - static_cast<double>(static_cast<T>(given_.mean[row])));
  }

  T mean_of(double sum) const {
    return given_.centred ? static_cast<T>(sum / static_cast<double>(n_)) : T(0);
  }

  void add_up(const std::vector<T>& partial, void* product) const {
    if (product == nullptr) return;
    for (int64_t i = 0; i < n_; ++i) {
      double sum = 0;
      for (int64_t task = 0; task < tasks_; ++task) sum += static_cast<double>(partial[task * n_ + i]);
      static_cast<T*>(product)[i] = static_cast<T>(sum);
    }
  }

  const Normalization& given_;
  const int64_t n_;
  const std::vector<T> weight_, bias_, tangent_weight_, tangent_bias_;
  const int64_t tasks_;
  std::vector<T> for_weight_, for_bias_;
};

}  // namespace

void normalize_rows(const Normalization& given, int threads) {
  if (given.wide) {
    NormalizedRows<double>(given).run(threads);
  } else {
    NormalizedRows<float>(given).run(threads);
  }
}

}  // namespace HVP_VARIANT
}  // namespace hvp
