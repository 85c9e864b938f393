// All terms of a series for the Hessian of a linear model in one call, and a Lanczos run. What the two forms
// of the series compute is in hvp_engine/linear_model/reference.py.
#pragma once

#include <cstdint>

namespace hvp {

// Matrices are row-major; a stride is the distance between rows. Everything has the type of the state.
struct LinearModel {
  bool wide;  // float64
  int64_t samples, features, outputs, batch;
  int64_t size;        // of one flat vector: the weights first, outputs x features
  int64_t bias;        // where the bias begins in a flat vector, or -1
  const void* inputs;  // samples x features
  int64_t input_stride;
  const void* curvature;      // outputs x padded samples
  const void* probabilities;  // likewise, or null where the outputs are not coupled
  int64_t padded_samples;
  const void* decay;  // one flat vector
  const void* gram;   // samples x padded samples; null for the direct form
};

struct NeumannTerms {
  double alpha, damping;
  int64_t iterations;
  bool horner;
};

// `v` and `p` hold one flat vector for each right-hand side, `figures` six numbers.
using LinearModelKernel = void (*)(const LinearModel& model, const NeumannTerms& terms, void* v, void* p,
                                   double* figures, int threads);

struct ChebyshevTerms {
  const double* coefficients;  // alpha and beta of each term, one more than products
  double damping;
  int64_t iterations;
};

// `residual` holds the right-hand sides on entry; `direction` and `x` are written. Figures as above.
using ChebyshevKernel = void (*)(const LinearModel& model, const ChebyshevTerms& terms, void* residual,
                                 void* direction, void* x, double* figures, int threads);

// `basis` holds one flat vector for each step, the first of them the start vector; `diagonal` and
// `off_diagonal` have one number for each step.
using LanczosKernel = void (*)(const LinearModel& model, void* basis, double* diagonal, double* off_diagonal,
                               int64_t steps, int threads);

}  // namespace hvp
