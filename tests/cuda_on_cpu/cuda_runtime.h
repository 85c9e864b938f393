// A stand-in for the CUDA runtime: kernels run on the CPU, one block after another. Barriers and shuffles are
// real, and every thread has to reach them; runtime.cpp says how.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifndef CUDART_VERSION
#define CUDART_VERSION 13000
#endif
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

namespace cuda_on_cpu {

struct Index {
  unsigned x = 0;
};
extern thread_local Index thread_index;
extern Index block_index;
extern Index grid_size;

void synchronize();
int synchronize_or(int predicate);
double shuffle_down(unsigned mask, double value, unsigned delta);

}  // namespace cuda_on_cpu

#define threadIdx (::cuda_on_cpu::thread_index)
#define blockIdx (::cuda_on_cpu::block_index)
#define gridDim (::cuda_on_cpu::grid_size)

inline void __syncthreads() { cuda_on_cpu::synchronize(); }
inline int __syncthreads_or(int predicate) { return cuda_on_cpu::synchronize_or(predicate); }
inline double __shfl_down_sync(unsigned mask, double value, unsigned delta) {
  return cuda_on_cpu::shuffle_down(mask, value, delta);
}
using std::isfinite;
using std::min;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t);
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t);
