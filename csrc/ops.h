// The arithmetic of every op on one element, shared by the CPU and the CUDA kernels.
//
// An op is a functor with the names and the meaning of its function in hvp_engine/ops/reference.py. It takes
// one element of the product and one of each of its kStates state vectors (the other arguments are unused),
// changes those whose bit is set in kMutated, and returns the two pairs whose products are summed into
// `partials`. If kMeasured is set, a first pass reads the whole state without changing it, and the update
// receives the sum of its second products over all elements as `measured`. If kSquares is set, the pairs are
// squares, and kSquared says which states hold the squared values after the update. Adding an op means adding
// its functor and its line in HVP_OPS.
#pragma once

#include "dtypes.h"

namespace hvp {

constexpr int kMaxStates = 3;
constexpr int kMaxScalars = 4;
constexpr int kNoState = -1;      // a squared value that no state holds
constexpr int64_t kChunk = 4096;  // elements of one tensor that make one row of partials

// Values that are the same for all elements of a call: the op's scalars in order, and the damping.
struct Scalars {
  double value[kMaxScalars];
  double damping;
  double measured;  // zero in the measuring pass, and for ops without one
};

template <class T>
struct Record {
  T left[2], right[2];
};

template <class T>
HVP_INLINE Record<T> squares(T first, T second) {
  return {{first, second}, {first, second}};
}

template <class T>
struct NeumannStep {
  static constexpr int kStates = 2, kScalars = 1;
  static constexpr bool kMeasured = false;
  static constexpr bool kSquares = true;
  static constexpr int kSquared[2] = {0, 1};
  static constexpr unsigned kMutated = 0b11;
  T alpha, damping;

  HVP_INLINE explicit NeumannStep(const Scalars& s) : alpha(T(s.value[0])), damping(T(s.damping)) {}
  HVP_INLINE Record<T> operator()(T hv, T& v, T& p, T&) const {
    v -= alpha * (hv + damping * v);
    p += v;
    return squares(v, p);
  }
};

template <class T>
struct NeumannStepHorner {
  static constexpr int kStates = 2, kScalars = 1;
  static constexpr bool kMeasured = false;
  static constexpr bool kSquares = true;
  static constexpr int kSquared[2] = {kNoState, 0};
  static constexpr unsigned kMutated = 0b01;
  T alpha, damping;

  HVP_INLINE explicit NeumannStepHorner(const Scalars& s) : alpha(T(s.value[0])), damping(T(s.damping)) {}
  HVP_INLINE Record<T> operator()(T hp, T& p, T& v, T&) const {
    const T increment = v - alpha * (hp + damping * p);
    p += increment;
    return squares(increment, p);
  }
};

template <class T>
struct ScaleAccumulate {
  static constexpr int kStates = 1, kScalars = 2;
  static constexpr bool kMeasured = false;
  static constexpr bool kSquares = true;
  static constexpr int kSquared[2] = {kNoState, 0};
  static constexpr unsigned kMutated = 0b1;
  T alpha, beta;

  HVP_INLINE explicit ScaleAccumulate(const Scalars& s) : alpha(T(s.value[0])), beta(T(s.value[1])) {}
  HVP_INLINE Record<T> operator()(T x, T& p, T&, T&) const {
    p = beta == T(0) ? alpha * x : alpha * x + beta * p;  // p may be uninitialized where beta is 0
    return squares(x, p);
  }
};

template <class T>
struct CgStep {
  static constexpr int kStates = 3, kScalars = 1;
  static constexpr bool kMeasured = true;  // the curvature d . (Ad + damping d)
  static constexpr bool kSquares = false;
  static constexpr unsigned kMutated = 0b011;
  T a, damping;

  HVP_INLINE explicit CgStep(const Scalars& s)
      : a(s.measured > 0 ? T(s.value[0] / s.measured) : T(0)), damping(T(s.damping)) {}
  HVP_INLINE Record<T> operator()(T ad, T& x, T& r, T& d) const {
    const T curved = ad + damping * d;
    x += a * d;
    r -= a * curved;
    return {{r, d}, {r, curved}};
  }
};

template <class T>
struct ChebyshevStep {
  static constexpr int kStates = 3, kScalars = 2;
  static constexpr bool kMeasured = false;
  static constexpr bool kSquares = true;
  static constexpr int kSquared[2] = {1, 0};
  static constexpr unsigned kMutated = 0b111;
  T alpha, beta, damping;

  HVP_INLINE explicit ChebyshevStep(const Scalars& s)
      : alpha(T(s.value[0])), beta(T(s.value[1])), damping(T(s.damping)) {}
  HVP_INLINE Record<T> operator()(T ad, T& x, T& r, T& d) const {
    r -= ad + damping * d;
    d = beta * d + alpha * r;
    x += d;
    return squares(r, x);
  }
};

#define HVP_OPS(X)                          \
  X(neumann_step, NeumannStep)              \
  X(neumann_step_horner, NeumannStepHorner) \
  X(scale_accumulate, ScaleAccumulate)      \
  X(cg_step, CgStep)                        \
  X(chebyshev_step, ChebyshevStep)

enum class OpCode : uint8_t {
#define HVP_ENUMERATE(name, Functor) name,
  HVP_OPS(HVP_ENUMERATE)
#undef HVP_ENUMERATE
};

struct OpTraits {
  const char* name;
  int states, scalars;
  bool measured;
};

constexpr OpTraits kOps[] = {
#define HVP_TRAITS(name, Functor) \
  {#name, Functor<float>::kStates, Functor<float>::kScalars, Functor<float>::kMeasured},
    HVP_OPS(HVP_TRAITS)
#undef HVP_TRAITS
};
constexpr int kOpCount = sizeof kOps / sizeof kOps[0];

}  // namespace hvp
