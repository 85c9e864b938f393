// All terms of a Chebyshev iteration for the Hessian of a linear model, in one call; its specification is
// linear_model_chebyshev in hvp_engine/linear_model/reference.py. Compiled once for each instruction set.
#include "linear_model_parts.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

template <class T>
class Chebyshev : Parts<T> {
  using Parts<T>::model_, Parts<T>::threads_, Parts<T>::decay_, Parts<T>::rows_of, Parts<T>::multiply;
  using Parts<T>::allocate, Parts<T>::measure;

 public:
  Chebyshev(const LinearModel& model, const ChebyshevTerms& terms, T* residual, T* direction, T* x,
            double* figures, int threads)
      : Parts<T>(model, threads),
        terms_(terms),
        damping_(T(terms.damping)),
        residual_(residual),
        direction_(direction),
        x_(x),
        figures_(figures) {}

  void run() {
    const int64_t elements = model_.batch * model_.size, updates = tasks(model_.size, kElements);
    allocate();
    measure_each(residual_, 0, 2);
    const T first = T(terms_.coefficients[0]);
    for (int64_t i = 0; i < elements; ++i) x_[i] = direction_[i] = first * residual_[i];
    std::vector<T> work(elements);
    T* const product = work.data();
    const std::vector<T*> from = rows_of(direction_), to = rows_of(product);
#pragma omp parallel num_threads(threads_)
    for (int64_t term = 1; term <= terms_.iterations; ++term) {
      multiply(direction_, from, product, to);
      const T alpha = T(terms_.coefficients[2 * term]), beta = T(terms_.coefficients[2 * term + 1]);
#pragma omp for schedule(static)
      for (int64_t task = 0; task < model_.batch * updates; ++task) {
        const int64_t offset = task % updates * kElements;
        update(task / updates * model_.size, offset, std::min(kElements, model_.size - offset), product,
               alpha, beta);
      }
    }
    measure_each(residual_, 3, 5);
    measure_each(x_, 4, 5);
  }

 private:
  // One step of the elements [offset, offset + count) of the flat vector that begins at `start`. It leaves
  // the product zero.
  void update(int64_t start, int64_t offset, int64_t count, T* product, T alpha, T beta) const {
    T* const r = residual_ + start + offset;
    T* const d = direction_ + start + offset;
    T* const x = x_ + start + offset;
    T* const hd = product + start + offset;
    const T* const decay = decay_ + offset;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      r[i] -= hd[i] + (decay[i] + damping_) * d[i];
      d[i] = beta * d[i] + alpha * r[i];
      x[i] += d[i];
      hd[i] = T(0);
    }
  }

  // Writes the squared norm of each vector, and sets its flag if an element is not finite.
  void measure_each(const T* vectors, int square, int flag) const {
    for (int64_t b = 0; b < model_.batch; ++b) {
      double* const figures = figures_ + 6 * b;
      double bad = 0;
      measure(vectors + b * model_.size, figures + square, &bad);
      if (bad != 0) figures[flag] = 1;
    }
  }

  const ChebyshevTerms& terms_;
  const T damping_;
  T* const residual_;
  T* const direction_;
  T* const x_;
  double* const figures_;
};

}  // namespace

void linear_model_chebyshev(const LinearModel& model, const ChebyshevTerms& terms, void* residual,
                            void* direction, void* x, double* figures, int threads) {
  if (model.wide) {
    Chebyshev(model, terms, static_cast<double*>(residual), static_cast<double*>(direction),
              static_cast<double*>(x), figures, threads)
        .run();
  } else {
    Chebyshev(model, terms, static_cast<float*>(residual), static_cast<float*>(direction),
              static_cast<float*>(x), figures, threads)
        .run();
  }
}

}  // namespace HVP_VARIANT
}  // namespace hvp
