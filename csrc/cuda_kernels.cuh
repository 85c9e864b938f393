// One kernel for all ops and types: a block updates one chunk of one tensor and writes its row of partials.
// Nothing is accumulated across blocks, so every run gives the same bits. An op that is measured first takes
// two more launches: the same kernel without stores, and one that adds up its rows.
#pragma once

#include <cuda_runtime.h>

#include "recurrences.h"
#include "step.h"

namespace hvp {

constexpr int kThreads = 256;
constexpr int kVector = 4;                 // consecutive elements of one thread
constexpr int kSpan = kThreads * kVector;  // elements of one pass of the block
static_assert(kChunk % kSpan == 0, "a full chunk is a whole number of passes");

// The products of one launch, passed by value in the kernel's parameters, since only they differ from call to
// call: 4 KB of parameters everywhere, 32 KB since CUDA 12.1. A launch copies all of them, so few products
// take the small variant.
constexpr int kSmall = 440;
#if CUDART_VERSION >= 12010
constexpr int kLarge = 3600;
#else
constexpr int kLarge = kSmall;
#endif

template <int kCapacity>
struct Products {
  const void* data[kCapacity];
  DType dtype[kCapacity];  // a product may come in another dtype than the call before
};

// What all tensors of a launch share.
struct Shared {
  void* states[kMaxStates];
  const double* scalars[kMaxScalars];
  double damping;
  const Slice* slices;  // these two from the launch's first row on
  double* partials;
  int64_t first_tensor;
};
static_assert(sizeof(Products<kSmall>) + sizeof(Shared) <= 4096, "parameters must fit");
static_assert(kLarge == kSmall || sizeof(Products<kLarge>) + sizeof(Shared) <= 32764, "parameters must fit");

template <class T>
struct alignas(sizeof(T) * kVector > 16 ? 16 : sizeof(T) * kVector) Vector {
  T at[kVector];
};

template <class T>
__device__ bool aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Vector<T>) == 0;
}

template <bool kAligned, class T>
__device__ Vector<T> load(const T* pointer) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const Vector<T>*>(pointer);
  } else {
    Vector<T> result;
#pragma unroll
    for (int j = 0; j < kVector; ++j) result.at[j] = pointer[j];
    return result;
  }
}

template <bool kAligned, class T>
__device__ void store(T* pointer, const Vector<T>& value) {
  if constexpr (kAligned) {
    *reinterpret_cast<Vector<T>*>(pointer) = value;
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) pointer[j] = value.at[j];
  }
}

struct Sums {
  double first = 0, second = 0;
  bool nonfinite = false;

  template <bool kMeasure, class T>
  __device__ void add(const Record<T>& r) {
    second += static_cast<double>(r.left[1]) * static_cast<double>(r.right[1]);
    if constexpr (!kMeasure) {
      first += static_cast<double>(r.left[0]) * static_cast<double>(r.right[0]);
      nonfinite |=
          !(isfinite(r.left[0]) && isfinite(r.right[0]) && isfinite(r.left[1]) && isfinite(r.right[1]));
    }
  }
};

// One chunk: the product at x, the states at a, b, c. Every thread sums the same elements in the same order
// whether the pointers are aligned or not.
template <template <class> class Op, bool kMeasure, class T, class Input>
struct Chunk {
  using F = Op<T>;
  static constexpr unsigned kStored = kMeasure ? 0 : F::kMutated;
  const F& op;
  const Input* x;
  T *a, *b, *c;
  Sums sums;

  // `kBatch` passes beginning at element `begin`: first all loads, so that they are in flight together.
  template <int kBatch, bool kAligned>
  __device__ void passes(int begin) {
    Vector<Input> xs[kBatch];
    Vector<T> as[kBatch], bs[kBatch], cs[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = begin + k * kSpan + static_cast<int>(threadIdx.x) * kVector;
      xs[k] = load<kAligned>(x + i);
      as[k] = load<kAligned>(a + i);
      if constexpr (F::kStates > 1) bs[k] = load<kAligned>(b + i);
      if constexpr (F::kStates > 2) cs[k] = load<kAligned>(c + i);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = begin + k * kSpan + static_cast<int>(threadIdx.x) * kVector;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        sums.template add<kMeasure>(op(widen<T>(xs[k].at[j]), as[k].at[j], bs[k].at[j], cs[k].at[j]));
      }
      if constexpr (kStored & 1) store<kAligned>(a + i, as[k]);
      if constexpr (kStored & 2) store<kAligned>(b + i, bs[k]);
      if constexpr (kStored & 4) store<kAligned>(c + i, cs[k]);
    }
  }

  __device__ void element(int i) {
    T s0 = a[i], s1 = T(0), s2 = T(0);
    if constexpr (F::kStates > 1) s1 = b[i];
    if constexpr (F::kStates > 2) s2 = c[i];
    sums.template add<kMeasure>(op(widen<T>(x[i]), s0, s1, s2));
    if constexpr (kStored & 1) a[i] = s0;
    if constexpr (kStored & 2) b[i] = s1;
    if constexpr (kStored & 4) c[i] = s2;
  }

  template <bool kAligned>
  __device__ void run(int count) {
    [[maybe_unused]] constexpr int kBatch = sizeof(T) == 4 ? 4 : 2;
    int begin = 0;
    if constexpr (kAligned) {
      for (; begin + kBatch * kSpan <= count; begin += kBatch * kSpan) passes<kBatch, kAligned>(begin);
    }
    for (; begin + kSpan <= count; begin += kSpan) passes<1, kAligned>(begin);
    const int i = begin + static_cast<int>(threadIdx.x) * kVector;
    for (int j = i; j < min(i + kVector, count); ++j) element(j);
  }
};

template <template <class> class Op, bool kMeasure, class T, class Input>
__device__ Sums run_chunk(const Op<T>& op, const void* data, const Shared& shared, const Slice& slice) {
  const auto state = [&](int k) {
    return k < Op<T>::kStates ? static_cast<T*>(shared.states[k]) + slice.offset : nullptr;
  };
  Chunk<Op, kMeasure, T, Input> chunk{
      op, static_cast<const Input*>(data) + slice.start, state(0), state(1), state(2), {}};
  const int count = static_cast<int>(slice.count);
  if (aligned(chunk.x) && aligned(chunk.a) && aligned(chunk.b) && aligned(chunk.c)) {
    chunk.template run<true>(count);
  } else {
    chunk.template run<false>(count);
  }
  return chunk.sums;
}

// The total of a block of so many threads, valid in thread 0. The order of the additions is fixed.
template <int kBlock>
__device__ Sums reduce(Sums sums) {
  constexpr int kWarps = kBlock / 32;
  __shared__ double first[kWarps], second[kWarps];
  for (int distance = 16; distance > 0; distance /= 2) {
    sums.first += __shfl_down_sync(0xffffffffu, sums.first, distance);
    sums.second += __shfl_down_sync(0xffffffffu, sums.second, distance);
  }
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x % 32 == 0) {
    first[warp] = sums.first;
    second[warp] = sums.second;
  }
  sums.nonfinite = __syncthreads_or(sums.nonfinite);
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) {
      sums.first += first[w];
      sums.second += second[w];
    }
  }
  return sums;
}

template <template <class> class Op, bool kMeasure, class T, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    step_kernel(const __grid_constant__ Products<kCapacity> products, const __grid_constant__ Shared shared) {
  const Slice slice = shared.slices[blockIdx.x];
  double* out = shared.partials + 3 * static_cast<int64_t>(blockIdx.x);
  Scalars scalars{};
  for (int i = 0; i < Op<T>::kScalars; ++i) scalars.value[i] = *shared.scalars[i];
  scalars.damping = shared.damping;
  if constexpr (Op<T>::kMeasured && !kMeasure) scalars.measured = out[0];
  const Op<T> op(scalars);

  const int64_t index = slice.tensor - shared.first_tensor;
  const void* data = products.data[index];
  Sums sums;
  switch (products.dtype[index]) {
    case DType::kFloat32:
      sums = run_chunk<Op, kMeasure, T, float>(op, data, shared, slice);
      break;
    case DType::kFloat64:
      if constexpr (sizeof(T) == 8) sums = run_chunk<Op, kMeasure, T, double>(op, data, shared, slice);
      break;
    case DType::kBFloat16:
      sums = run_chunk<Op, kMeasure, T, BFloat16>(op, data, shared, slice);
      break;
    case DType::kFloat16:
      sums = run_chunk<Op, kMeasure, T, Float16>(op, data, shared, slice);
      break;
  }
  sums = reduce<kThreads>(sums);
  if (threadIdx.x == 0) {
    out[0] = sums.first;
    out[1] = sums.second;
    out[2] = sums.nonfinite ? 1.0 : 0.0;
  }
}

// Adds up the second column of all rows and writes the total into the first column of each row, where each
// block of the update finds it in the row that only it overwrites. As many threads as a block can have keep
// as many loads in flight. Every block makes the whole sum, in the same order and so with the same bits, and
// writes a share of the rows: sums of parts would need memory of their own, and one more launch to add them
// up.
constexpr int kTotalThreads = 1024;
constexpr int64_t kMostTotalBlocks = 4;

__global__ void __launch_bounds__(kTotalThreads) total_kernel(double* partials, int64_t rows) {
  __shared__ double total;
  Sums sums;
#pragma unroll 4
  for (int64_t row = threadIdx.x; row < rows; row += kTotalThreads) sums.second += partials[3 * row + 1];
  sums = reduce<kTotalThreads>(sums);
  if (threadIdx.x == 0) total = sums.second;
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTotalThreads + threadIdx.x;
  for (int64_t row = first; row < rows; row += gridDim.x * kTotalThreads) partials[3 * row] = total;
}

// The numbers between two passes, by one thread of one warp.
template <class Recurrence>
__global__ void recurrence_kernel(double* numbers) {
  if (threadIdx.x == 0) Recurrence::run(numbers);
}

}  // namespace hvp
