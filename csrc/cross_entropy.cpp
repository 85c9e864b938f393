// The rows of cross_entropy.h, compiled once for each instruction set. A row is read twice or three times,
// from the second time on out of the cache; sums are made of blocks in the logits' type, and of these in
// float64.
#include "cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "exponential.h"

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
         std::log(summed<T>(n, [=](int64_t i) { return exponential(z[i] - most); }));
}

template <class T>
class Rows {
 public:
  explicit Rows(const CrossEntropy& given)
      : given_(given),
        logits_(static_cast<const T*>(given.logits)),
        weight_(static_cast<const T*>(given.weight)),
        spread_(given.smoothing / static_cast<double>(given.classes)) {}

  int64_t value(T* losses, T* log_sum_exp, int threads) const {
    return each(threads, [=](int64_t row) {
      const T* const z = at(row);
      const double lse = log_sum_exp_of(z, given_.classes);
      log_sum_exp[row] = static_cast<T>(lse);
      losses[row] = ignored(row) ? T(0) : static_cast<T>(total(row) * lse - dot(row, z));
    });
  }

  int64_t backward(const T* grad, const T* log_sum_exp, T* gradient, int threads) const {
    const int64_t n = given_.classes;
    return each(threads, [=](int64_t row) {
      T* const out = gradient + row * n;
      if (ignored(row)) {
        std::fill(out, out + n, T(0));
        return;
      }
      const T* const z = at(row);
      const T lse = log_sum_exp[row], factor = static_cast<T>(grad[row] * total(row));
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = factor * exponential(z[i] - lse);
      subtract_targets(row, grad[row], out);
    });
  }

  int64_t double_backward(const T* tangent, const T* grad, const T* log_sum_exp, T* grad_product, T* product,
                          int threads) const {
    const int64_t n = given_.classes;
    return each(threads, [=](int64_t row) {
      T* const out = product + row * n;
      if (ignored(row)) {
        std::fill(out, out + n, T(0));
        grad_product[row] = T(0);
        return;
      }
      const T* const z = at(row);
      const T* const t = tangent + row * n;
      const T lse = log_sum_exp[row], factor = static_cast<T>(grad[row] * total(row));
      const double mean = summed<T>(n, [=](int64_t i) {
        const T probability = exponential(z[i] - lse);
        out[i] = probability;
        return probability * t[i];
      });
      grad_product[row] = static_cast<T>(total(row) * mean - dot(row, t));
      const T shift = static_cast<T>(mean);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = factor * out[i] * (t[i] - shift);
    });
  }

 private:
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
  const T* const logits_;
  const T* const weight_;
  const double spread_;
};

template <class T>
void log_softmax_rows(int64_t rows, int64_t n, const T* input, T* output, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    const T* const x = input + row * n;
    T* const out = output + row * n;
    const T most = largest(x, n);
    const T rest =
        static_cast<T>(std::log(summed<T>(n, [=](int64_t i) { return exponential(x[i] - most); })));
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = (x[i] - most) - rest;
  }
}

template <class T>
void log_softmax_backward_rows(const LogSoftmax& given, const T* grad, T* gradient, int threads) {
  const int64_t n = given.classes;
  const T* const output = static_cast<const T*>(given.output);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < given.rows; ++row) {
    const T* const y = output + row * n;
    const T* const g = grad + row * n;
    T* const out = gradient + row * n;
    const T sum = static_cast<T>(summed<T>(n, [=](int64_t i) { return g[i]; }));
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = g[i] - exponential(y[i]) * sum;
  }
}

template <class T>
void log_softmax_double_backward_rows(const LogSoftmax& given, const T* tangent, const T* grad,
                                      T* grad_product, T* product, int threads) {
  const int64_t n = given.classes;
  const T* const output = static_cast<const T*>(given.output);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < given.rows; ++row) {
    const T* const y = output + row * n;
    const T* const g = grad + row * n;
    const T* const t = tangent + row * n;
    T* const centred = grad_product + row * n;
    T* const out = product + row * n;
    const T sum = static_cast<T>(summed<T>(n, [=](int64_t i) { return g[i]; }));
    const T mean = static_cast<T>(summed<T>(n, [=](int64_t i) {
      const T probability = exponential(y[i]);
      out[i] = probability;
      return probability * t[i];
    }));
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      centred[i] = t[i] - mean;
      out[i] *= -sum * t[i];
    }
  }
}

}  // namespace

int64_t cross_entropy(const CrossEntropy& given, void* losses, void* log_sum_exp, int threads) {
  return given.wide ? Rows<double>(given).value(static_cast<double*>(losses),
                                                static_cast<double*>(log_sum_exp), threads)
                    : Rows<float>(given).value(static_cast<float*>(losses), static_cast<float*>(log_sum_exp),
                                               threads);
}

int64_t cross_entropy_backward(const CrossEntropy& given, const void* grad, const void* log_sum_exp,
                               void* gradient, int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return Rows<T>(given).backward(static_cast<const T*>(grad), static_cast<const T*>(log_sum_exp),
                                   static_cast<T*>(gradient), threads);
  };
  return given.wide ? run(0.0) : run(0.0f);
}

int64_t cross_entropy_double_backward(const CrossEntropy& given, const void* tangent, const void* grad,
                                      const void* log_sum_exp, void* grad_product, void* product,
                                      int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return Rows<T>(given).double_backward(static_cast<const T*>(tangent), static_cast<const T*>(grad),
                                          static_cast<const T*>(log_sum_exp), static_cast<T*>(grad_product),
                                          static_cast<T*>(product), threads);
  };
  return given.wide ? run(0.0) : run(0.0f);
}

void log_softmax(bool wide, int64_t rows, int64_t classes, const void* input, void* output, int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    log_softmax_rows(rows, classes, static_cast<const T*>(input), static_cast<T*>(output), threads);
  };
  wide ? run(0.0) : run(0.0f);
}

void log_softmax_backward(const LogSoftmax& given, const void* grad, void* gradient, int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    log_softmax_backward_rows(given, static_cast<const T*>(grad), static_cast<T*>(gradient), threads);
  };
  given.wide ? run(0.0) : run(0.0f);
}

void log_softmax_double_backward(const LogSoftmax& given, const void* tangent, const void* grad,
                                 void* grad_product, void* product, int threads) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    log_softmax_double_backward_rows(given, static_cast<const T*>(tangent), static_cast<const T*>(grad),
                                     static_cast<T*>(grad_product), static_cast<T*>(product), threads);
  };
  given.wide ? run(0.0) : run(0.0f);
}

}  // namespace HVP_VARIANT
}  // namespace hvp
