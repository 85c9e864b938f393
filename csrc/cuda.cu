// Launches the kernels of cuda_kernels.cuh.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda.h"
#include "cuda_kernels.cuh"

namespace hvp {
namespace {

void require(cudaError_t error, const char* op, const char* action) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": " + action + ": " + cudaGetErrorString(error));
}

const char* name_of(const Step& step) { return kOps[static_cast<int>(step.op)].name; }

// Makes `device` current, and the previous one again at the end of the scope.
class DeviceGuard {
 public:
  DeviceGuard(const char* op, int device) {
    require(cudaGetDevice(&previous_), op, "no current CUDA device");
    if (previous_ == device) return;
    require(cudaSetDevice(device), op, "cannot select the CUDA device");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

template <template <class> class Op, bool kMeasure, int kCapacity>
const void* kernel_of(bool wide) {
  return wide ? reinterpret_cast<const void*>(step_kernel<Op, kMeasure, double, kCapacity>)
              : reinterpret_cast<const void*>(step_kernel<Op, kMeasure, float, kCapacity>);
}

template <int kCapacity>
const void* kernel_of(OpCode op, bool measure, bool wide) {
  switch (op) {
#define HVP_CASE(name, Functor)                                      \
  case OpCode::name:                                                 \
    if constexpr (Functor<float>::kMeasured) {                       \
      if (measure) return kernel_of<Functor, true, kCapacity>(wide); \
    }                                                                \
    return kernel_of<Functor, false, kCapacity>(wide);
    HVP_OPS(HVP_CASE)
#undef HVP_CASE
  }
  return nullptr;
}

const void* kernel_of(RecurrenceCode code) {
  switch (code) {
#define HVP_CASE(name, Struct) \
  case RecurrenceCode::name:   \
    return reinterpret_cast<const void*>(recurrence_kernel<Struct>);
    HVP_RECURRENCES(HVP_CASE)
#undef HVP_CASE
  }
  return nullptr;
}

// Launches the tensors [begin, end), whose products fit in one launch's parameters.
template <int kCapacity>
void launch(const Step& step, bool measure, Shared shared, size_t begin, size_t end, cudaStream_t stream) {
  const int64_t first_row = step.parts[begin].row;
  const int64_t blocks = (end < step.parts.size() ? step.parts[end].row : step.rows) - first_row;
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("more chunks than a CUDA grid has blocks");
  shared.slices += first_row;
  shared.partials += 3 * first_row;
  shared.first_tensor = static_cast<int64_t>(begin);
  Products<kCapacity> products;
  for (size_t i = begin; i < end; ++i) {
    products.data[i - begin] = step.products[i].data;
    products.dtype[i - begin] = step.products[i].dtype;
  }
  void* arguments[] = {&products, &shared};
  require(cudaLaunchKernel(kernel_of<kCapacity>(step.op, measure, step.wide),
                           dim3(static_cast<unsigned>(blocks)), dim3(kThreads), arguments, 0, stream),
          name_of(step), "CUDA launch failed");
}

// One pass over all tensors, in as few launches as they fit in.
void run_pass(const Step& step, bool measure, const Shared& shared, cudaStream_t stream) {
  const size_t count = step.parts.size();
  if (count <= kSmall) {
    launch<kSmall>(step, measure, shared, 0, count, stream);
    return;
  }
  for (size_t begin = 0; begin < count; begin += kLarge) {
    launch<kLarge>(step, measure, shared, begin, std::min(count, begin + kLarge), stream);
  }
}

}  // namespace

std::string cuda_problem() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return std::string("CUDA: ") + cudaGetErrorString(error);
  return count == 0 ? "CUDA: no device was found" : "";
}

void run_cuda(const Step& step, int device, void* stream_handle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  const DeviceGuard guard(name_of(step), device);
  if (step.rows == 0) {
    require(cudaMemsetAsync(step.partials, 0, 3 * sizeof(double), stream), name_of(step),
            "CUDA memset failed");
    return;
  }
  Shared shared{};
  std::copy(step.states, step.states + kMaxStates, shared.states);
  std::copy(step.scalars, step.scalars + kMaxScalars, shared.scalars);
  shared.damping = step.damping;
  shared.slices = step.slices;
  shared.partials = step.partials;
  if (kOps[static_cast<int>(step.op)].measured) {
    run_pass(step, true, shared, stream);
    double* partials = step.partials;
    int64_t rows = step.rows;
    void* arguments[] = {&partials, &rows};
    const int64_t blocks = std::min((rows + kTotalThreads - 1) / kTotalThreads, kMostTotalBlocks);
    require(cudaLaunchKernel(reinterpret_cast<const void*>(total_kernel), dim3(static_cast<unsigned>(blocks)),
                             dim3(kTotalThreads), arguments, 0, stream),
            name_of(step), "CUDA launch failed");
  }
  run_pass(step, false, shared, stream);
}

void run_recurrence_cuda(RecurrenceCode code, double* numbers, int device, void* stream) {
  const char* name = kRecurrences[static_cast<int>(code)].name;
  const DeviceGuard guard(name, device);
  void* arguments[] = {&numbers};
  require(
      cudaLaunchKernel(kernel_of(code), dim3(1), dim3(32), arguments, 0, static_cast<cudaStream_t>(stream)),
      name, "CUDA launch failed");
}

}  // namespace hvp
