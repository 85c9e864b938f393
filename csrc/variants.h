// The kernels for CPUs: everything that is compiled once for each instruction set, in the namespace
// HVP_VARIANT.
#pragma once

#include <string>

#include "attention.h"
#include "convolution.h"
#include "cross_entropy.h"
#include "normalization.h"
#include "ops.h"
#include "program.h"
#include "recurrent.h"

namespace hvp {

// Updates `count` elements, of the product at `data` and of the states from `offset` on, and writes one row
// of partials. A measuring kernel leaves the states as they are and writes only the second sum.
using ChunkKernel = void (*)(const void* data, void* const* states, int64_t offset, int64_t count,
                             const Scalars& scalars, double* row);

struct Variant {
  const char* name;
  ChunkKernel (*chunk_kernel)(OpCode op, bool measure, bool wide, DType dtype);  // null where a product is
                                                                                 // wider than the state
  ProgramKernel run_program;
  AttentionWorkspace attention_workspace;
  AttentionKernel attention;
  RecurrentKernel run_recurrence;
  ConvolutionKernel run_convolution;
  CrossEntropyKernel cross_entropy;
  LogSoftmaxKernel log_softmax;
  NormalizationKernel normalize_images, normalize_rows;
};

// The kernels in use.
const Variant& variant();

// Called on import: chooses the widest kernels that are compiled, that this CPU can run, and that torch
// itself would use; `capability` is what torch.backends.cpu.get_cpu_capability() returns.
void choose_variant(const std::string& capability);

#define HVP_DECLARE_VARIANT(name)                                                           \
  namespace name {                                                                          \
  ChunkKernel chunk_kernel(OpCode op, bool measure, bool wide, DType dtype);                \
  bool run_program(const Program&, void* const* slots, const double* row, int threads);     \
  int64_t attention_workspace(const Attention& attention, int level);                       \
  void attention(const Attention& attention, int level, void* workspace, int threads);      \
  void run_recurrence(const RecurrentLayer&, void* const* tensors, int threads);            \
  void run_convolution(const Convolution&, const ConvolutionPairs&, void* to, int threads); \
  int64_t cross_entropy(const CrossEntropy&, int threads);                                  \
  void log_softmax(const LogSoftmax&, int threads);                                         \
  void normalize_images(const Normalization&, int threads);                                 \
  void normalize_rows(const Normalization&, int threads);                                   \
  }
HVP_DECLARE_VARIANT(baseline)
HVP_DECLARE_VARIANT(avx2)
#undef HVP_DECLARE_VARIANT

}  // namespace hvp
