#include "variants.h"

namespace hvp {
namespace {

#define HVP_VARIANT_OF(name)     \
  {#name,                        \
   name::chunk_kernel,           \
   name::linear_model_direct,    \
   name::linear_model_dual,      \
   name::linear_model_chebyshev, \
   name::linear_model_lanczos}

constexpr Variant kBaseline = HVP_VARIANT_OF(baseline);
const Variant* chosen = &kBaseline;

}  // namespace

const Variant& variant() { return *chosen; }

void choose_variant([[maybe_unused]] const std::string& capability) {
#ifdef HVP_HAS_X86
  static constexpr Variant kAvx2 = HVP_VARIANT_OF(avx2);  // kernels with AVX512 were no faster
  const bool allowed = capability == "AVX2" || capability == "AVX512";
  if (allowed && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) chosen = &kAvx2;
#endif
}

}  // namespace hvp
