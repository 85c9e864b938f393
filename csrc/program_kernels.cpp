// The interpreter of programs, compiled for each instruction set.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "dtypes.h"
#include "elementary_functions.h"
#include "matrix_products.h"
#include "variants.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

constexpr int64_t kRegisterBytes = 2048;
// Below this many elements one thread is faster than waking others.
constexpr int64_t kParallelElements = int64_t{1} << 18;

template <class T>
class Interpreter {
 public:
  Interpreter(const Program& program, void* const* slots, const double* row, int threads)
      : program_(program), slots_(slots), row_(row), threads_(threads) {}

  bool run() const {
    bool in_range = true;
    for (const Program::Step& step : program_.steps) {
      switch (step.kind) {
        case Kind::kElementwise:
          elementwise(program_.elementwise[step.index]);
          break;
        case Kind::kMatrixProduct:
          product(program_.products[step.index]);
          break;
        case Kind::kSum:
          sum(program_.sums[step.index]);
          break;
        case Kind::kLookup:
          in_range &= lookup(program_.lookups[step.index]);
          break;
        case Kind::kRecurrence:
          recurrence(program_.recurrences[step.index]);
          break;
        case Kind::kConvolution:
          convolution(program_.convolutions[step.index]);
          break;
      }
    }
    return in_range;
  }

 private:
  static constexpr int64_t kBlock = kRegisterBytes / static_cast<int64_t>(sizeof(T));
  // Longer rows are faster where they are than copied side by side.
  static constexpr int64_t kShort = kBlock / 8;

  T* at(const Place& place) const { return static_cast<T*>(slots_[place.slot]) + place.offset; }

  double constant(int64_t index) const { return index >= 0 ? row_[index] : program_.constants[-1 - index]; }

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

  void elementwise(const Elementwise& operation) const {
    const Cut cut(operation);
    const int64_t tasks = cut.lines * cut.blocks, elements = cut.lines * cut.rows * cut.width;
    if (elements == 0) return;
    if (threads_ == 1 || elements < kParallelElements) {
      run_blocks(operation, cut, 0, tasks);
      return;
    }
#pragma omp parallel for schedule(static) num_threads(threads_)
    for (int64_t share = 0; share < threads_; ++share) {
      run_blocks(operation, cut, tasks * share / threads_, tasks * (share + 1) / threads_);
    }
  }

  // Blocks [begin, end), counted line by line.
  void run_blocks(const Elementwise& operation, const Cut& cut, int64_t begin, int64_t end) const {
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
      values[i] = has_constant(next.code) ? static_cast<T>(constant(next.constant)) : T(0);
      seconds[i] = next.code == Code::kAffine ? static_cast<T>(constant(next.second)) : T(0);
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
    T* pointer = at(place);
    for (int64_t d = 0; d < extents; ++d) pointer += position[d] * place.strides[d];
    return pointer;
  }

  void product(const MatrixProduct& product) const {
    if (product.m == 0 || product.n == 0) return;
    const bool small =
        threads_ > 1 && product.m * product.n * std::max<int64_t>(1, product.k) < kParallelProducts;
    const OneBlasThread alone(small);
    for (int64_t i = 0; i < product.batch; ++i) {
      multiply<T>(
          {product.transpose_a, product.transpose_b, product.m, product.n, product.k,
           static_cast<T>(constant(product.alpha)), at(product.a) + i * product.a.strides[0], product.lda,
           at(product.b) + i * product.b.strides[0], product.ldb, static_cast<T>(constant(product.beta)),
           at(product.c) + i * product.c.strides[0], product.ldc},
          small ? 1 : threads_);
    }
  }

  // For each index of the kept extents but the last: the sums of a block of the last extent at once.
  void sum(const Sum& sum) const {
    const int64_t last = sum.extents - 1, width = sum.sizes[last];
    int64_t kept = 1, summed = 1;
    for (int64_t d = 0; d < sum.kept; ++d) kept *= sum.sizes[d];
    for (int64_t d = sum.kept; d < last; ++d) summed *= sum.sizes[d];
    const int64_t from_stride = sum.from.strides[last], to_stride = sum.to.strides[last];
    // Along one line of memory where a line is what is summed; otherwise line by line.
    const bool along = width == 1 && summed > 0;
    const int64_t length = along ? sum.sizes[last - 1] : 1, line = along ? sum.from.strides[last - 1] : 0;
    const int64_t lines = along && length > 0 ? summed / length : summed;
    const int64_t outer = along ? last - 1 : last;
    for (int64_t i = 0; i < kept; ++i) {
      const T* from = at(sum.from);
      T* to = at(sum.to);
      for (int64_t d = sum.kept - 1, rest = i; d >= 0; --d) {
        from += rest % sum.sizes[d] * sum.from.strides[d];
        to += rest % sum.sizes[d] * sum.to.strides[d];
        rest /= sum.sizes[d];
      }
      for (int64_t first = 0; first < width; first += kColumns) {
        const int64_t n = std::min(kColumns, width - first);
        double totals[kColumns];
        std::fill(totals, totals + n, sum.largest ? -std::numeric_limits<double>::infinity() : 0.0);
        for (int64_t j = 0; j < lines; ++j) {
          const T* here = from + first * from_stride;
          for (int64_t d = outer - 1, rest = j; d >= sum.kept; --d) {
            here += rest % sum.sizes[d] * sum.from.strides[d];
            rest /= sum.sizes[d];
          }
          if (sum.largest) {
            const int64_t count = along ? length : n, stride = along ? line : from_stride;
            for (int64_t i = 0; i < count; ++i) keep_larger(totals[along ? 0 : i], here[i * stride]);
          } else if (along) {
            totals[0] += total(here, line, length);
          } else {
            add(here, from_stride, totals, n);
          }
        }
        for (int64_t j = 0; j < n; ++j) to[(first + j) * to_stride] = static_cast<T>(totals[j]);
      }
    }
  }

  // NaN, once found, stays.
  static HVP_INLINE void keep_larger(double& largest, double value) {
    if (value > largest || value != value) largest = value;
  }

  static HVP_INLINE void add(const T* from, int64_t stride, double* totals, int64_t n) {
    if (stride == 1) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) totals[i] += static_cast<double>(from[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) totals[i] += static_cast<double>(from[i * stride]);
    }
  }

  static HVP_INLINE double total(const T* from, int64_t stride, int64_t n) {
    double sum = 0;
    if (stride == 1) {
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(from[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(from[i * stride]);
    }
    return sum;
  }

  bool lookup(const Lookup& lookup) const {
    const auto* const index = static_cast<const int64_t*>(slots_[lookup.index.slot]) + lookup.index.offset;
    if (lookup.sizes[0] == 1 && lookup.sizes[2] == 1) return lookup_numbers(lookup, index);
    bool in_range = true;
    for (int64_t i = 0; i < lookup.sizes[0]; ++i) {
      for (int64_t j = 0; j < lookup.sizes[1]; ++j) {
        const int64_t row = index[j * lookup.index.strides[0]];
        const bool skipped = row == lookup.skipped;
        if (!skipped && (row < 0 || row >= lookup.rows)) {
          in_range = false;
          continue;
        }
        if (skipped && lookup.scatter) continue;
        const int64_t chosen = skipped ? 0 : row;
        const int64_t from_row = lookup.scatter ? j : chosen, to_row = lookup.scatter ? chosen : j;
        const int64_t from_start = lookup.scatter ? 0 : j * lookup.from.strides[3];
        const int64_t to_start = lookup.scatter ? j * lookup.to.strides[3] : 0;
        const T* const from =
            at(lookup.from) + i * lookup.from.strides[0] + from_row * lookup.from.strides[1] + from_start;
        T* const to = at(lookup.to) + i * lookup.to.strides[0] + to_row * lookup.to.strides[1] + to_start;
        const int64_t a = lookup.from.strides[2], b = lookup.to.strides[2];
        if (skipped) {
          for (int64_t k = 0; k < lookup.sizes[2]; ++k) to[k * b] = T(0);
        } else if (!lookup.scatter) {
          for (int64_t k = 0; k < lookup.sizes[2]; ++k) to[k * b] = from[k * a];
        } else {
          for (int64_t k = 0; k < lookup.sizes[2]; ++k) to[k * b] += from[k * a];
        }
      }
    }
    return in_range;
  }

  // One number for each index, as of max-pooling.
  bool lookup_numbers(const Lookup& lookup, const int64_t* index) const {
    const T* const from = at(lookup.from);
    T* const to = at(lookup.to);
    const int64_t step = lookup.index.strides[0],
                  row_step = (lookup.scatter ? lookup.to : lookup.from).strides[1];
    const int64_t table_step = (lookup.scatter ? lookup.to : lookup.from).strides[3];
    const int64_t chosen_step = (lookup.scatter ? lookup.from : lookup.to).strides[1];
    bool in_range = true;
    for (int64_t j = 0; j < lookup.sizes[1]; ++j) {
      const int64_t row = index[j * step];
      const bool chosen = row >= 0 && row < lookup.rows && row != lookup.skipped;
      in_range &= chosen || row == lookup.skipped;
      const int64_t place = chosen ? row * row_step + j * table_step : 0;
      if (!lookup.scatter) {
        if (chosen || row == lookup.skipped) to[j * chosen_step] = chosen ? from[place] : T(0);
      } else if (chosen) {
        to[place] += from[j * chosen_step];
      }
    }
    return in_range;
  }

  void recurrence(const RecurrenceStep& step) const {
    void* tensors[kMostRecurrentTensors];
    std::transform(step.tensors.begin(), step.tensors.end(), tensors,
                   [this](const Place& place) { return place.slot < 0 ? nullptr : at(place); });
    run_recurrence(step.recurrence, tensors, threads_);
  }

  void convolution(const ConvolutionStep& step) const {
    ConvolutionPair pairs[kMostConvolutionPairs];
    const int64_t count = static_cast<int64_t>(step.pairs.size());
    for (int64_t i = 0; i < count; ++i) pairs[i] = {at(step.pairs[i][0]), at(step.pairs[i][1])};
    run_convolution(step.convolution, {pairs, count}, at(step.to), threads_);
  }

  static constexpr int64_t kColumns = 256;
  const Program& program_;
  void* const* const slots_;
  const double* const row_;
  const int threads_;
};

}  // namespace

bool run_program(const Program& program, void* const* slots, const double* row, int threads) {
  return program.wide ? Interpreter<double>(program, slots, row, threads).run()
                      : Interpreter<float>(program, slots, row, threads).run();
}

}  // namespace HVP_VARIANT
}  // namespace hvp
