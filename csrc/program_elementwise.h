// Elementwise operations of programs, block by block: each instruction runs on as many elements as stay in
// the first-level cache.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "dtypes.h"
#include "elementary_functions.h"
#include "program_memory.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

constexpr int64_t kRegisterBytes = 2048;
// Below this many elements one thread is faster than waking others.
constexpr int64_t kParallelElements = int64_t{1} << 18;

template <class T>
class ElementwiseKernel {
 public:
  static void run(const ProgramMemory<T>& memory, const Elementwise& operation, int threads) {
    ElementwiseKernel(memory, operation).run(threads);
  }

 private:
  static constexpr int64_t kBlock = kRegisterBytes / static_cast<int64_t>(sizeof(T));
  // Longer rows are faster where they are than copied side by side.
  static constexpr int64_t kShort = kBlock / 8;

  // How an elementwise operation is cut: its first `depth` extents give the lines, and each line has blocks,
  // which are parts of one row or, where rows are short, several rows.
  struct Cut {
    int64_t depth, lines, blocks;
    int64_t rows, width;  // of a line
    int64_t together;     // rows of a block

    explicit Cut(const Elementwise& operation) {
      const int64_t inner = std::max<int64_t>(0, operation.extents - 1);
      width = operation.extents == 0 ? 1 : operation.sizes[inner];
      const int64_t neighbours = inner == 0 ? 1 : operation.sizes[inner - 1];
      together = width == 0 || width > kShort ? 1 : std::min(neighbours, kBlock / width);
      const bool several = together > 1;
      depth = several ? inner - 1 : inner;
      rows = several ? neighbours : 1;
      blocks = several ? (rows + together - 1) / together : (width + kBlock - 1) / kBlock;
      lines = 1;
      for (int64_t d = 0; d < depth; ++d) lines *= operation.sizes[d];
    }
  };

  ElementwiseKernel(const ProgramMemory<T>& memory, const Elementwise& operation)
      : memory_(memory), operation_(operation), cut_(operation) {}

  void run(int threads) const {
    const int64_t tasks = cut_.lines * cut_.blocks, elements = cut_.lines * cut_.rows * cut_.width;
    if (elements == 0) return;
    if (threads == 1 || elements < kParallelElements) {
      run_blocks(0, tasks);
      return;
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t share = 0; share < threads; ++share) {
      run_blocks(tasks * share / threads, tasks * (share + 1) / threads);
    }
  }

  // Blocks [begin, end), counted line by line.
  void run_blocks(int64_t begin, int64_t end) const {
    const Elementwise& operation = operation_;
    const Cut& cut = cut_;
    alignas(64) T scratch[kMaxRegisters][kBlock];
    T* registers[kMaxRegisters];
    T* inputs[kMaxInputs];
    T* outputs[kMaxInputs];
    T values[kMaxRegisters], seconds[kMaxRegisters];
    const bool several = cut.rows > 1;
    const int64_t inner = std::max<int64_t>(0, operation.extents - 1), outer = several ? inner - 1 : inner;
    const size_t input_count = operation.inputs.size(), output_count = operation.outputs.size();
    const size_t count = operation.instructions.size();
    for (int64_t r = 0; r < operation.registers; ++r) registers[r] = scratch[r];
    for (size_t i = 0; i < count; ++i) {
      const Instruction& next = operation.instructions[i];
      values[i] = has_constant(next.code) ? static_cast<T>(memory_.constant(next.constant)) : T(0);
      seconds[i] = next.code == Code::kAffine ? static_cast<T>(memory_.constant(next.second)) : T(0);
    }
    // Whether the elements of each block stand one after another in memory.
    const auto dense = [&](const Place& place) {
      return (place.strides[inner] == 1 || cut.width == 1) && (!several || place.strides[outer] == cut.width);
    };
    bool dense_inputs[kMaxInputs], dense_outputs[kMaxInputs];
    for (size_t i = 0; i < input_count; ++i) dense_inputs[i] = dense(operation.inputs[i]);
    for (size_t i = 0; i < output_count; ++i) dense_outputs[i] = dense(operation.outputs[i].place);
    int64_t line = begin / cut.blocks, block = begin % cut.blocks;
    for (int64_t task = begin; task < end;) {
      std::array<int64_t, kMaxExtents> position{};
      for (int64_t d = cut.depth - 1, rest = line; d >= 0; --d) {
        position[d] = rest % operation.sizes[d];
        rest /= operation.sizes[d];
      }
      for (size_t i = 0; i < input_count; ++i) inputs[i] = start(operation.inputs[i], position, cut.depth);
      for (size_t i = 0; i < output_count; ++i)
        outputs[i] = start(operation.outputs[i].place, position, cut.depth);
      for (; block < cut.blocks && task < end; ++block, ++task) {
        const int64_t first = block * (several ? cut.together : kBlock);
        const int64_t rows = several ? std::min(cut.together, cut.rows - first) : 1;
        const int64_t width = several ? cut.width : std::min(kBlock, cut.width - first), n = rows * width;
        for (size_t i = 0; i < input_count; ++i) {
          const Place& place = operation.inputs[i];
          T* const from = inputs[i] + first * place.strides[outer];
          registers[i] = dense_inputs[i] ? from : scratch[i];
          if (dense_inputs[i]) continue;
          for (int64_t r = 0; r < rows; ++r)
            load(from + r * place.strides[outer], place.strides[inner], scratch[i] + r * width, width);
        }
        for (size_t i = 0; i < output_count; ++i) {
          const Output& output = operation.outputs[i];
          if (!output.direct) continue;
          T* const to = outputs[i] + first * output.place.strides[outer];
          registers[output.source] = dense_outputs[i] ? to : scratch[output.source];
        }
        for (size_t i = 0; i < count; ++i) {
          const Instruction& next = operation.instructions[i];
          execute(next, values[i], seconds[i], registers[next.to], registers[next.a], registers[next.b],
                  registers[next.c], n);
        }
        for (size_t i = 0; i < output_count; ++i) {
          const Place& place = operation.outputs[i].place;
          const T* const from = registers[operation.outputs[i].source];
          T* const to = outputs[i] + first * place.strides[outer];
          if (dense_outputs[i]) {
            store(from, to, 1, n);
            continue;
          }
          for (int64_t r = 0; r < rows; ++r)
            store(from + r * width, to + r * place.strides[outer], place.strides[inner], width);
        }
      }
      block = 0;
      ++line;
    }
  }

  T* start(const Place& place, const std::array<int64_t, kMaxExtents>& position, int64_t extents) const {
    T* pointer = memory_.at(place);
    for (int64_t d = 0; d < extents; ++d) pointer += position[d] * place.strides[d];
    return pointer;
  }

  // One instruction on `n` elements. A register may be the memory of an input, but then it begins where that
  // does.
  static void execute(const Instruction& instruction, T value, T second, T* to, const T* a, const T* b,
                      const T* c, int64_t n) {
    switch (instruction.code) {
      case Code::kMultiply:
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = a[i] * b[i];
        break;
      case Code::kAdd:
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = a[i] + b[i];
        break;
      case Code::kSubtract:
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = a[i] - b[i];
        break;
      case Code::kDivide:
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = a[i] / b[i];
        break;
      case Code::kMultiplyAdd:
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = a[i] * b[i] + c[i];
        break;
      case Code::kScale:
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = a[i] * value;
        break;
      case Code::kShift:
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = a[i] + value;
        break;
      case Code::kFill:
        std::fill(to, to + n, value);
        break;
      case Code::kSelect:
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = b[i] != T(0) ? a[i] : T(0);
        break;
      case Code::kSelectAbove:
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = b[i] <= value ? T(0) : a[i];
        break;
      case Code::kTanhGradient:
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = a[i] * (T(1) - b[i] * b[i]);
        break;
      case Code::kSigmoidGradient:
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = a[i] * ((T(1) - b[i]) * b[i]);
        break;
      case Code::kExponential:
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = exponential(a[i]);
        break;
      case Code::kLogarithm:
        for (int64_t i = 0; i < n; ++i) to[i] = std::log(a[i]);
        break;
      case Code::kSquareRoot:
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = std::sqrt(a[i]);
        break;
      case Code::kTanh:
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = hyperbolic_tangent(a[i]);
        break;
      case Code::kSigmoid:
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = sigmoid(a[i]);
        break;
      case Code::kAffine:
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) to[i] = a[i] * value + second;
        break;
      case Code::kCount:
        break;
    }
  }

  static HVP_INLINE void load(const T* from, int64_t stride, T* to, int64_t n) {
    if (stride == 1) {
      std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
    } else if (stride == 0) {
      std::fill(to, to + n, *from);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = from[i * stride];
    }
  }

  static HVP_INLINE void store(const T* from, T* to, int64_t stride, int64_t n) {
    if (stride == 1) {
      if (from != to) std::memmove(to, from, static_cast<size_t>(n) * sizeof(T));
    } else {
      for (int64_t i = 0; i < n; ++i) to[i * stride] = from[i];
    }
  }

  const ProgramMemory<T>& memory_;
  const Elementwise& operation_;
  const Cut cut_;
};

}  // namespace
}  // namespace HVP_VARIANT
}  // namespace hvp
