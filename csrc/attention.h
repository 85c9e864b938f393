// Attention and its two derivatives, for one backend: the CPU. The meaning of each is in
// hvp_engine/differentiable/attention/reference.py.
#pragma once

#include <cstdint>

namespace hvp {

// The rows of an operand, batch x heads x rows, each contiguous; null where it is missing.
struct AttentionRows {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;  // strides
};

enum class AttentionMask : uint8_t { kNone, kBoolean, kAdded };

struct Attention {
  bool wide;  // float64, else float32
  int64_t batch, heads, key_heads, queries, keys, width, value_width;
  double scale;
  bool causal;

  AttentionMask mask_kind = AttentionMask::kNone;
  const void* mask = nullptr;  // bytes, or numbers of the operands' type
  int64_t mask_strides[4] = {};

  double keep = 1;  // with dropout: the probability of keeping a weight; one is kept if its word is not below
  uint64_t seed = 0;
  uint32_t threshold = 0;
  bool dropout = false;

  AttentionRows query, key, value, grad_output;
  AttentionRows grad_grad_query, grad_grad_key, grad_grad_value;  // each may be missing
  void* results[4] =
      {};  // contiguous, in the order of the reference; those of keys and values begin as zeros
};

// Floating numbers of workspace that each thread needs.
using AttentionWorkspace = int64_t (*)(const Attention& attention, int level);

// The value (level 0), its derivative (1), or the derivative of that (2); each thread has its own part of
// `workspace`.
using AttentionKernel = void (*)(const Attention& attention, int level, void* workspace, int threads);

}  // namespace hvp
