#include "variants.h"

#include "tile_products.h"

namespace hvp {
namespace {

#define HVP_VARIANT_OF(name)  \
  {#name,                     \
   name::chunk_kernel,        \
   name::run_program,         \
   name::attention_workspace, \
   name::attention,           \
   name::run_recurrence,      \
   name::run_convolution,     \
   name::cross_entropy,       \
   name::log_softmax,         \
   name::normalize_images,    \
   name::normalize_rows}

constexpr Variant kBaseline = HVP_VARIANT_OF(baseline);
const Variant* chosen = &kBaseline;
#ifdef HVP_HAS_X86
bool tiles = false;
#endif

}  // namespace

const Variant& variant() { return *chosen; }

void choose_variant([[maybe_unused]] const std::string& capability) {
#ifdef HVP_HAS_X86
  static constexpr Variant kAvx2 = HVP_VARIANT_OF(avx2);  // kernels with AVX512 were no faster
  const bool allowed = capability == "AVX2" || capability == "AVX512";
  choose_tiles(capability == "AVX512");
  if (allowed && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) chosen = &kAvx2;
#endif
}

#ifdef HVP_HAS_X86
bool tiles_in_use() { return tiles; }

void choose_tiles(bool allowed) {
  tiles = allowed && __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace hvp
