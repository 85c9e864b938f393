// The scalar recurrences of Krylov methods, shared by the CPU and the CUDA kernels.
//
// A recurrence is a struct with the name and the meaning of its function in hvp_engine/ops/reference.py. It
// reads and writes the numbers at `s`, which stand in the order of its list in hvp_engine/ops/recurrences.py.
// Flags are 0 or 1. Comparisons are written so that NaN goes the way that it goes there.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"

namespace hvp {

HVP_INLINE double flag(bool value) { return value ? 1.0 : 0.0; }

// clang-format off
struct CgNumbers {
  enum Number {
    squared, curvature, nonfinite, metric,
    preconditioned, enough,
    rho, beta, size, negative, bad, bad_metric,
    kNumbers
  };
};

struct MinresNumbers {
  enum Number {
    alpha, nonfinite, norm, scale, search_norm, value_norm, residual_norm,
    epsilon, flat, preconditioned, enough,
    cosine, sine, delta_bar, epsilon_k, size, beta, minus_beta,
    gamma_bar, phi, phi_bar, slope, squared, lowest, moving, least, bad, bad_metric,
    minus_alpha, minus_delta, minus_epsilon, inverse, inverse_gamma, step, keep, minus_shift,
    kNumbers
  };
};
// clang-format on

struct CgRecurrence : CgNumbers {
  HVP_INLINE static void run(double* s) {
    const double inverse_step = s[curvature] / s[rho];
    if (s[rho] > 0 && (inverse_step > s[size] || inverse_step != inverse_step)) s[size] = inverse_step;
    if (s[rho] > 0 && !(s[curvature] > 0)) s[negative] = 1;
    if (s[nonfinite] > 0) s[bad] = 1;
    const bool is_preconditioned = s[preconditioned] > 0;
    if (is_preconditioned && s[squared] > 0 && !(s[metric] > 0) && !(s[bad] > 0)) s[bad_metric] = 1;
    const double following = is_preconditioned ? s[metric] : s[squared];
    const bool moving = s[squared] > s[enough] && !(s[negative] > 0);
    s[beta] = s[rho] > 0 ? following / s[rho] : 0;
    s[rho] = moving ? following : 0;
  }
};

struct MinresLanczos : MinresNumbers {
  HVP_INLINE static void run(double* s) {
    if (s[nonfinite] > 0) s[bad] = 1;
    const double delta = s[cosine] * s[delta_bar] + s[sine] * s[alpha];
    s[gamma_bar] = s[sine] * s[delta_bar] - s[cosine] * s[alpha];
    s[minus_alpha] = -s[alpha];
    s[minus_delta] = -delta;
    s[minus_epsilon] = -s[epsilon_k];
  }
};

struct MinresReflection : MinresNumbers {
  HVP_INLINE static void run(double* s) {
    double length = s[norm];
    if (s[preconditioned] > 0) {
      if (s[scale] > 0 && !(length > -s[epsilon] * s[scale]) && !(s[bad] > 0)) s[bad_metric] = 1;
      length = sqrt(length < 0 ? 0 : length);
    }
    length *= flag(length > 100 * s[epsilon] * hypot(hypot(s[alpha], s[beta]), length));
    s[inverse] = length > 0 ? 1 / length : 0;
    const double row = hypot(hypot(s[alpha], length), s[beta]);
    if (row > s[size] || row != row) s[size] = row;
    s[epsilon_k] = s[sine] * length;
    s[delta_bar] = -s[cosine] * length;
    const double gamma = hypot(s[gamma_bar], length);
    s[inverse_gamma] = gamma > 0 ? 1 / gamma : 0;
    s[cosine] = s[gamma_bar] * s[inverse_gamma];
    s[sine] = length * s[inverse_gamma];
    s[phi] = s[cosine] * s[phi_bar];
    s[beta] = length;
    s[minus_beta] = -length;
  }
};

struct MinresUpdate : MinresNumbers {
  HVP_INLINE static void run(double* s) {
    const double next = hypot(s[gamma_bar], s[delta_bar]);
    const double reach = fabs(s[phi]) * s[search_norm] + s[value_norm];
    const bool endless = s[epsilon] * s[size] * reach > sqrt(s[squared]);
    if (s[moving] > 0 && (next <= s[flat] * s[size] || endless)) {
      s[slope] = next;
      s[least] = 1;
      s[moving] = 0;
    }
    s[phi_bar] *= s[sine];
    const bool moves = s[moving] > 0;
    s[step] = moves ? s[phi] : 0;
    s[keep] = moves ? s[sine] * s[sine] : 1;
    s[minus_shift] = moves ? -s[phi_bar] * s[cosine] : 0;
  }
};

struct MinresResidual : MinresNumbers {
  HVP_INLINE static void run(double* s) {
    const double before = s[squared];
    s[squared] = s[residual_norm] * s[residual_norm];
    if (!(s[preconditioned] > 0)) {
      if (before < s[lowest] || before != before) s[lowest] = before;
      const double limit = 1 + sqrt(s[epsilon]);
      if (s[moving] > 0 && s[squared] > limit * limit * s[lowest]) {
        s[least] = 1;
        s[moving] = 0;
      }
    }
    if (!(s[squared] > s[enough])) s[moving] = 0;
  }
};

#define HVP_RECURRENCES(X)               \
  X(cg_recurrence, CgRecurrence)         \
  X(minres_lanczos, MinresLanczos)       \
  X(minres_reflection, MinresReflection) \
  X(minres_update, MinresUpdate)         \
  X(minres_residual, MinresResidual)

enum class RecurrenceCode : uint8_t {
#define HVP_ENUMERATE(name, Struct) name,
  HVP_RECURRENCES(HVP_ENUMERATE)
#undef HVP_ENUMERATE
};

struct RecurrenceTraits {
  const char* name;
  int numbers;
};

constexpr RecurrenceTraits kRecurrences[] = {
#define HVP_TRAITS(name, Struct) {#name, Struct::kNumbers},
    HVP_RECURRENCES(HVP_TRAITS)
#undef HVP_TRAITS
};

}  // namespace hvp
