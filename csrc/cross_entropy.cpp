// The rows of cross_entropy.h, compiled once for each instruction set. A row is read twice or three times,
// from the second time on out of the cache; sums are made of blocks in the logits' type, and of these in
// float64.
#include "cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "elementary_functions.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

constexpr int64_t kBlock = 512;  // elements of one partial sum

template <class T>
T largest(const T* x, int64_t n) {
  T most = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// The sum over i of term(i); each term is computed once.
template <class T, class Term>
HVP_INLINE double summed(int64_t n, const Term& term) {
  double total = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t end = std::min(first + kBlock, n);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = first; i < end; ++i) sum += term(i);
    total += static_cast<double>(sum);
  }
  return total;
}

template <class T>
double log_sum_exp_of(const T* z, int64_t n) {
  const T most = largest(z, n);
  // All logits -inf, or one inf: NaN, as their differences are. A NaN among finite ones enters by its term.
  return static_cast<double>(most) +
         std::log(summed<T>(n, [=](int64_t i) { return exponential_or_zero(z[i] - most); }));
}

template <class T>
class Rows {
 public:
  explicit Rows(const CrossEntropy& given)
      : given_(given),
        logits_(static_cast<const T*>(given.logits)),
        weight_(static_cast<const T*>(given.weight)),
        grad_(static_cast<const T*>(given.grad)),
        log_sum_exp_(static_cast<T*>(given.log_sum_exp)),
        per_row_(static_cast<T*>(given.per_row)),
        product_(static_cast<T*>(given.product)),
        spread_(given.smoothing / static_cast<double>(given.classes)) {}

  int64_t run(int threads) const {
    switch (given_.level) {
      case Level::kValue:
        return value(threads);
      case Level::kBackward:
        return backward(threads);
      case Level::kDoubleBackward:
        return double_backward(threads);
    }
    return -1;
  }

 private:
  int64_t value(int threads) const {
    return each(threads, [=](int64_t row) {
      const T* const z = at(row);
      const double lse = log_sum_exp_of(z, given_.classes);
      log_sum_exp_[row] = static_cast<T>(lse);
      per_row_[row] = ignored(row) ? T(0) : static_cast<T>(total(row) * lse - dot(row, z));
    });
  }

  int64_t backward(int threads) const {
    const int64_t n = given_.classes;
    return each(threads, [=](int64_t row) {
      T* const out = product_ + row * n;
      if (ignored(row)) {
        std::fill(out, out + n, T(0));
        return;
      }
      const T* const z = at(row);
      const T lse = log_sum_exp_[row], factor = static_cast<T>(grad_[row] * total(row));
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = factor * exponential_or_zero(z[i] - lse);
      subtract_targets(row, grad_[row], out);
    });
  }

  int64_t double_backward(int threads) const {
    const int64_t n = given_.classes;
    const T* const tangent = static_cast<const T*>(given_.tangent);
    return each(threads, [=](int64_t row) {
      T* const out = product_ + row * n;
      if (ignored(row)) {
        std::fill(out, out + n, T(0));
        per_row_[row] = T(0);
        return;
      }
      const T* const z = at(row);
      const T* const t = tangent + row * n;
      const T lse = log_sum_exp_[row], factor = static_cast<T>(grad_[row] * total(row));
      const double mean = summed<T>(n, [=](int64_t i) {
        const T probability = exponential_or_zero(z[i] - lse);
        out[i] = probability;
        return probability * t[i];
      });
      per_row_[row] = static_cast<T>(total(row) * mean - dot(row, t));
      const T shift = static_cast<T>(mean);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = factor * out[i] * (t[i] - shift);
    });
  }

  const T* at(int64_t row) const { return logits_ + row * given_.classes; }
  bool ignored(int64_t row) const { return given_.target[row] == given_.ignored; }
  double at_label(int64_t row) const {
    const double weight = weight_ == nullptr ? 1 : static_cast<double>(weight_[given_.target[row]]);
    return (1 - given_.smoothing) * weight;
  }

  // The sum of q.
  double total(int64_t row) const { return at_label(row) + spread_ * given_.weight_total; }

  // The sum of q x.
  double dot(int64_t row, const T* x) const {
    double sum = at_label(row) * static_cast<double>(x[given_.target[row]]);
    if (spread_ == 0) return sum;
    const T* const w = weight_;
    const double smooth = w == nullptr ? summed<T>(given_.classes, [=](int64_t i) { return x[i]; })
                                       : summed<T>(given_.classes, [=](int64_t i) { return w[i] * x[i]; });
    return sum + spread_ * smooth;
  }

  // out -= grad q.
  void subtract_targets(int64_t row, T grad, T* out) const {
    if (spread_ != 0) {
      const T each = static_cast<T>(grad * spread_);
      const T* const w = weight_;
#pragma omp simd
      for (int64_t i = 0; i < given_.classes; ++i) out[i] -= w == nullptr ? each : each * w[i];
    }
    out[given_.target[row]] -= static_cast<T>(grad * at_label(row));
  }

  template <class Work>
  int64_t each(int threads, const Work& work) const {
    for (int64_t row = 0; row < given_.rows; ++row) {
      const int64_t label = given_.target[row];
      if (label != given_.ignored && (label < 0 || label >= given_.classes)) return row;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < given_.rows; ++row) work(row);
    return -1;
  }

  const CrossEntropy& given_;
  const T *const logits_, *const weight_, *const grad_;
  T *const log_sum_exp_, *const per_row_, *const product_;
  const double spread_;
};

template <class T>
void log_softmax_row(int64_t n, const T* x, T* out) {
  const T most = largest(x, n);
  const T rest =
      static_cast<T>(std::log(summed<T>(n, [=](int64_t i) { return exponential_or_zero(x[i] - most); })));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - most) - rest;
}

template <class T>
void log_softmax_backward_row(int64_t n, const T* y, const T* g, T* out) {
  const T sum = static_cast<T>(summed<T>(n, [=](int64_t i) { return g[i]; }));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = g[i] - exponential_or_zero(y[i]) * sum;
}

template <class T>
void log_softmax_double_backward_row(int64_t n, const T* y, const T* g, const T* t, T* centred, T* out) {
  const T sum = static_cast<T>(summed<T>(n, [=](int64_t i) { return g[i]; }));
  const T mean = static_cast<T>(summed<T>(n, [=](int64_t i) {
    const T probability = exponential_or_zero(y[i]);
    out[i] = probability;
    return probability * t[i];
  }));
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    centred[i] = t[i] - mean;
    out[i] *= -sum * t[i];
  }
}

template <class T>
void log_softmax_rows(const LogSoftmax& p, int threads) {
  const int64_t n = p.classes;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < p.rows; ++row) {
    const T* const x = static_cast<const T*>(p.given) + row * n;
    T* const out = static_cast<T*>(p.first) + row * n;
    if (p.level == Level::kValue) {
      log_softmax_row(n, x, out);
      continue;
    }
    const T* const g = static_cast<const T*>(p.grad) + row * n;
    if (p.level == Level::kBackward) {
      log_softmax_backward_row(n, x, g, out);
    } else {
      log_softmax_double_backward_row(n, x, g, static_cast<const T*>(p.tangent) + row * n, out,
                                      static_cast<T*>(p.second) + row * n);
    }
  }
}

}  // namespace

int64_t cross_entropy(const CrossEntropy& given, int threads) {
  return given.wide ? Rows<double>(given).run(threads) : Rows<float>(given).run(threads);
}

void log_softmax(const LogSoftmax& given, int threads) {
  given.wide ? log_softmax_rows<double>(given, threads) : log_softmax_rows<float>(given, threads);
}

}  // namespace HVP_VARIANT
}  // namespace hvp
