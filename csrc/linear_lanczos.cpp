// A short Lanczos run for the Hessian of a linear model, in one call: hvp_engine/solvers/lanczos.py says what
// it computes. Compiled once for each instruction set, with HVP_VARIANT naming the namespace.
#include <cmath>
#include <limits>

#include "linear_model_parts.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

template <class T>
class Lanczos : Parts<T> {
  using Parts<T>::model_, Parts<T>::threads_, Parts<T>::decay_, Parts<T>::rows_of, Parts<T>::multiply;

 public:
  Lanczos(const LinearModel& model, T* basis, double* diagonal, double* off_diagonal, int64_t steps,
          int threads)
      : Parts<T>(model, threads),
        basis_(basis),
        diagonal_(diagonal),
        off_diagonal_(off_diagonal),
        steps_(steps),
        chunks_(tasks(model.size, kElements)),
        sums_(chunks_ * steps),
        coefficients_(steps),
        work_(model.size) {
    this->allocate();
  }

  // Row 0 of the basis holds the start vector, of any length.
  void run() {
    T* const work = work_.data();
    const std::vector<T*> to = rows_of(work);
#pragma omp parallel num_threads(threads_)
    {
#pragma omp for schedule(static)
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) sums_[chunk] = dot(chunk, basis_, basis_);
#pragma omp single
      norm_ = std::sqrt(total(0, 1));
      scale(basis_, basis_);
      for (int64_t k = 0; k < steps_; ++k) {
        T* const vector = basis_ + k * model_.size;
        const std::vector<T*> from = rows_of(vector);
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
          for (int64_t i = begin(chunk); i < end(chunk); ++i) work[i] = decay_[i] * vector[i];
        }
        multiply(vector, from, work, to);
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) project(chunk, k + 1);
        reduce(k + 1);
#pragma omp single
        {
          diagonal_[k] = coefficients_[k];
          squared_ = 0;
          for (int64_t j = 0; j <= k; ++j) squared_ += coefficients_[j] * coefficients_[j];
        }
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
          subtract(chunk, k + 1);
          project(chunk, k + 1);
        }
        reduce(k + 1);  // a second pass: in float32 one leaves too much rounding
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
          subtract(chunk, k + 1);
          sums_[chunk] = dot(chunk, work, work);
        }
#pragma omp single
        {
          // In an invariant subspace what is left is rounding: taken as a direction, it would repeat an
          // eigenvalue.
          norm_ = std::sqrt(total(0, 1));
          const double negligible = 100.0 * static_cast<double>(std::numeric_limits<T>::epsilon());
          if (norm_ <= negligible * std::sqrt(norm_ * norm_ + squared_)) norm_ = 0;
          off_diagonal_[k] = norm_;
        }
        if (k + 1 < steps_) scale(work, vector + model_.size);
      }
    }
  }

 private:
  int64_t begin(int64_t chunk) const { return chunk * kElements; }
  int64_t end(int64_t chunk) const { return std::min(begin(chunk) + kElements, model_.size); }

  double dot(int64_t chunk, const T* x, const T* y) const {
    T sum = 0;
    const int64_t first = begin(chunk), last = end(chunk);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = first; i < last; ++i) sum += x[i] * y[i];
    return static_cast<double>(sum);
  }

  // This chunk's share of the coefficients of `work` in the first `count` vectors.
  void project(int64_t chunk, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      sums_[chunk * count + j] = dot(chunk, basis_ + j * model_.size, work_.data());
    }
  }

  void subtract(int64_t chunk, int64_t count) {
    T* const work = work_.data();
    const int64_t first = begin(chunk), last = end(chunk);
    for (int64_t j = 0; j < count; ++j) {
      const T* const vector = basis_ + j * model_.size;
      const T factor = T(coefficients_[j]);
#pragma omp simd
      for (int64_t i = first; i < last; ++i) work[i] -= factor * vector[i];
    }
  }

  double total(int64_t j, int64_t count) const {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) sum += sums_[chunk * count + j];
    return sum;
  }

  void reduce(int64_t count) {
#pragma omp single
    for (int64_t j = 0; j < count; ++j) coefficients_[j] = total(j, count);
  }

  // to <- from / norm, or zero.
  void scale(const T* from, T* to) const {
    const T factor = norm_ > 0 ? T(1 / norm_) : T(0);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
      for (int64_t i = begin(chunk); i < end(chunk); ++i) to[i] = factor * from[i];
    }
  }

  T* const basis_;
  double* const diagonal_;
  double* const off_diagonal_;
  const int64_t steps_, chunks_;
  std::vector<double> sums_, coefficients_;
  std::vector<T> work_;
  double norm_ = 0, squared_ = 0;
};

}  // namespace

void linear_model_lanczos(const LinearModel& model, void* basis, double* diagonal, double* off_diagonal,
                          int64_t steps, int threads) {
  if (model.wide) {
    Lanczos(model, static_cast<double*>(basis), diagonal, off_diagonal, steps, threads).run();
  } else {
    Lanczos(model, static_cast<float*>(basis), diagonal, off_diagonal, steps, threads).run();
  }
}

}  // namespace HVP_VARIANT
}  // namespace hvp
