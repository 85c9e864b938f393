// The recurrences, compiled for each instruction set.
#include "recurrent_gru.h"
#include "recurrent_lstm.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

template <class T>
void run(const RecurrentLayer& recurrence, void* const* tensors, int threads) {
  switch (recurrence.code) {
    case RecurrentCode::kLstm:
      return Lstm<T>(recurrence, tensors, threads).value();
    case RecurrentCode::kLstmBackward:
      return Lstm<T>(recurrence, tensors, threads).backward();
    case RecurrentCode::kLstmDoubleBackward:
      return Lstm<T>(recurrence, tensors, threads).double_backward();
    case RecurrentCode::kGru:
      return Gru<T>(recurrence, tensors, threads).value();
    case RecurrentCode::kGruBackward:
      return Gru<T>(recurrence, tensors, threads).backward();
    case RecurrentCode::kGruDoubleBackward:
      return Gru<T>(recurrence, tensors, threads).double_backward();
    case RecurrentCode::kCount:
      return;
  }
}

}  // namespace

void run_recurrence(const RecurrentLayer& recurrence, void* const* tensors, int threads) {
  if (recurrence.units == 0) return;
  recurrence.wide ? run<double>(recurrence, tensors, threads) : run<float>(recurrence, tensors, threads);
}

}  // namespace HVP_VARIANT
}  // namespace hvp
