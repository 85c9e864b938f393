// The Neumann series of a linear model, compiled once for each instruction set, in the namespace HVP_VARIANT.
// The state, the product and the small factors stay in the cache from term to term; each term reads the
// inputs once, block by block.
#include "linear_model_parts.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

template <class T>
class Solve : Parts<T> {
  using Parts<T>::model_, Parts<T>::threads_, Parts<T>::inputs_, Parts<T>::decay_, Parts<T>::rows_;
  using Parts<T>::row, Parts<T>::rows_of, Parts<T>::curve, Parts<T>::multiply, Parts<T>::allocate,
      Parts<T>::measure;

 public:
  Solve(const LinearModel& model, const NeumannTerms& terms, T* v, T* p, double* figures, int threads)
      : Parts<T>(model, threads),
        terms_(terms),
        v_(v),
        p_(p),
        figures_(figures),
        alpha_(T(terms.alpha)),
        damping_(T(terms.damping)) {}

  void direct() {
    begin();
    allocate();
    work_.assign(model_.batch * model_.size, T(0));
    T* const product = work_.data();
    T* const direction = terms_.horner ? p_ : v_;
    const std::vector<T*> from = rows_of(direction), to = rows_of(product);
    const int64_t updates = tasks(model_.size, kElements);
#pragma omp parallel num_threads(threads_)
    for (int64_t term = 1; term <= terms_.iterations; ++term) {
      multiply(direction, from, product, to);
#pragma omp for schedule(static)
      for (int64_t task = 0; task < model_.batch * updates; ++task) {
        const int64_t offset = task % updates * kElements;
        update(task / updates * model_.size, offset, std::min(kElements, model_.size - offset), product,
               term == terms_.iterations);
      }
    }
    finish(terms_.horner && terms_.iterations > 0 ? product : v_);
  }

  // Every vector is c v_0 + S X, beside its bias, so that a term only changes c, S and the bias.
  void dual() {
    begin();
    const int64_t n = model_.samples, padded = model_.padded_samples, k = model_.outputs;
    const T* const gram = static_cast<const T*>(model_.gram);
    const T shift = decay_[0] + damping_;
    std::vector<T> initial(rows_ * padded), curved(rows_ * padded);
    std::vector<T> term(rows_ * padded), sum(rows_ * padded);        // S of the last term and of the sum
    std::vector<T> term_bias(rows_), sum_bias(rows_), start(rows_);  // zero without a bias
    T* const u = curved.data();
    const std::vector<T*> from = rows_of(v_);
    std::vector<T*> to(rows_);
    for (int64_t r = 0; r < rows_; ++r) {
      to[r] = u + r * padded;
      if (model_.bias >= 0) start[r] = v_[r / k * model_.size + model_.bias + r % k];
    }
    term_bias = sum_bias = start;
    const T* const source = terms_.horner ? sum.data() : term.data();
    const T* const bias = terms_.horner ? sum_bias.data() : term_bias.data();
    double c_term = 1, c_sum = 1;  // in float64, since rounding adds up in the powers of one factor
#pragma omp parallel num_threads(threads_)
    {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < tasks(n, kSamples); ++task) {
        const int64_t here = task * kSamples;
        dots(row(here), model_.input_stride, std::min(kSamples, n - here), from.data(), rows_,
             model_.features, initial.data() + here, padded);
      }
      for (int64_t step = 0; step < terms_.iterations; ++step) {
        const T c = T(terms_.horner ? c_sum : c_term);
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < tasks(padded, kColumns); ++chunk) {
          const int64_t begin = chunk * kColumns, end = std::min(begin + kColumns, padded);
          for (int64_t r = 0; r < rows_; ++r) {
            for (int64_t m = begin; m < end; ++m) to[r][m] = c * initial[r * padded + m] + bias[r];
          }
          add_products(to.data(), rows_, source, padded, gram, padded, n, begin, end);
          curve(u + begin, padded, begin, end - begin);
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows_; ++r) {
          T* const s = term.data() + r * padded;
          T* const total = sum.data() + r * padded;
          const T* const from_s = source + r * padded;
          const T* const g = u + r * padded;
          const T keep = terms_.horner ? T(0) : T(1);
#pragma omp simd
          for (int64_t m = 0; m < padded; ++m) {
            const T next = keep * from_s[m] - alpha_ * (shift * from_s[m] + g[m]);
            s[m] = next;
            total[m] += next;
          }
          if (model_.bias >= 0) {
            T product = (decay_[model_.bias + r % k] + damping_) * bias[r];
            for (int64_t m = 0; m < n; ++m) product += g[m];
            term_bias[r] = (terms_.horner ? start[r] : term_bias[r]) - alpha_ * product;
            sum_bias[r] += term_bias[r];
          }
        }
#pragma omp single
        {
          const double factor = terms_.alpha * (double(decay_[0]) + terms_.damping);
          c_term = terms_.horner ? 1 - factor * c_sum : (1 - factor) * c_term;
          c_sum += c_term;
        }
      }
    }
    expand(p_, T(c_sum), sum, sum_bias);
    T* residual = v_;
    if (terms_.horner && terms_.iterations > 0) {
      work_.assign(v_, v_ + model_.batch * model_.size);
      residual = work_.data();
    }
    if (terms_.iterations > 0) expand(residual, T(c_term), term, term_bias);
    finish(residual);
  }

 private:
  // One step of the elements [offset, offset + count) of the flat vector that begins at `start`. It leaves
  // the product zero, or, in the last step of the Horner form, the residual in its place.
  void update(int64_t start, int64_t offset, int64_t count, T* product, bool last) const {
    T* const v = v_ + start + offset;
    T* const p = p_ + start + offset;
    T* const hv = product + start + offset;
    const T* const decay = decay_ + offset;
    if (terms_.horner) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const T increment = v[i] - alpha_ * (hv[i] + (decay[i] + damping_) * p[i]);
        p[i] += increment;
        hv[i] = last ? increment : T(0);
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        v[i] -= alpha_ * (hv[i] + (decay[i] + damping_) * v[i]);
        p[i] += v[i];
        hv[i] = T(0);
      }
    }
  }

  // state <- c state + S X, with its bias; `state` is v_0.
  void expand(T* state, T c, const std::vector<T>& s, const std::vector<T>& bias) const {
    const std::vector<T*> to = rows_of(state);
    const int64_t chunks = tasks(model_.features, kColumns);
#pragma omp parallel for schedule(static) num_threads(threads_)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t begin = chunk * kColumns, end = std::min(begin + kColumns, model_.features);
      for (int64_t r = 0; r < rows_; ++r) {
        for (int64_t j = begin; j < end; ++j) to[r][j] *= c;
      }
      add_products(to.data(), rows_, s.data(), model_.padded_samples, inputs_, model_.input_stride,
                   model_.samples, begin, end);
    }
    if (model_.bias < 0) return;
    for (int64_t r = 0; r < rows_; ++r) {
      state[r / model_.outputs * model_.size + model_.bias + r % model_.outputs] = bias[r];
    }
  }

  void begin() {
    std::copy(v_, v_ + model_.batch * model_.size, p_);
    for (int64_t b = 0; b < model_.batch; ++b) {
      double* const figures = figures_ + 6 * b;
      std::fill(figures, figures + 6, 0.0);
      measure(v_ + b * model_.size, figures, figures + 2);
    }
  }

  void finish(const T* residual) {
    for (int64_t b = 0; b < model_.batch; ++b) {
      T* const p = p_ + b * model_.size;
      double* const figures = figures_ + 6 * b;
      double bad_residual = 0;
      measure(residual + b * model_.size, figures + 3, &bad_residual);
      measure(p, figures + 4, figures + 5);
      if (bad_residual != 0) figures[5] = 1;
      for (int64_t i = 0; i < model_.size; ++i) p[i] *= alpha_;
    }
  }

  const NeumannTerms& terms_;
  T* const v_;
  T* const p_;
  double* const figures_;
  const T alpha_, damping_;
  std::vector<T> work_;
};

}  // namespace

void linear_model_direct(const LinearModel& model, const NeumannTerms& terms, void* v, void* p,
                         double* figures, int threads) {
  if (model.wide) {
    Solve(model, terms, static_cast<double*>(v), static_cast<double*>(p), figures, threads).direct();
  } else {
    Solve(model, terms, static_cast<float*>(v), static_cast<float*>(p), figures, threads).direct();
  }
}

void linear_model_dual(const LinearModel& model, const NeumannTerms& terms, void* v, void* p, double* figures,
                       int threads) {
  if (model.wide) {
    Solve(model, terms, static_cast<double*>(v), static_cast<double*>(p), figures, threads).dual();
  } else {
    Solve(model, terms, static_cast<float*>(v), static_cast<float*>(p), figures, threads).dual();
  }
}

}  // namespace HVP_VARIANT
}  // namespace hvp
