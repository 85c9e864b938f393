// The recurrences of LSTM and GRU layers and their derivatives: what each computes is the function of its
// name in hvp_engine/differentiable/recurrent/reference.py.
#pragma once

#include <cstdint>
#include <vector>

namespace hvp {

enum class RecurrentCode : int64_t {
  kLstm,
  kLstmBackward,
  kLstmDoubleBackward,
  kGru,
  kGruBackward,
  kGruDoubleBackward,
  kCount,
};

// A tensor that a recurrence takes or gives, row after row. Rows: all of all times ('N'), one for each
// sequence
// ('B'), those of the weight ('W') or of the weight transposed ('T'), or one ('V'). Columns: `blocks` times
// the units, except of a weight.
struct RecurrentTensor {
  char kind;
  int64_t blocks;
  bool optional;  // may be null: zeros if it is taken, not wanted if it is given
  bool given;     // by the recurrence
};

constexpr int kMostRecurrentTensors = 16;

// In the order of the reference, except that the value and the double backward take the weight transposed.
const std::vector<RecurrentTensor>& recurrence_tensors(RecurrentCode code);

struct RecurrentLayer {
  RecurrentCode code;
  bool wide;     // float64
  bool reverse;  // whether sequences are read from their ends
  int64_t units;
  std::vector<int64_t> batch_sizes;  // rows at each time; they do not grow

  int64_t rows_of(const RecurrentTensor& tensor) const;
  int64_t columns_of(const RecurrentTensor& tensor) const;
};

// Whether batch sizes are positive and do not grow.
bool packed(const std::vector<int64_t>& batch_sizes);

using RecurrentKernel = void (*)(const RecurrentLayer& recurrence, void* const* tensors, int threads);

}  // namespace hvp
