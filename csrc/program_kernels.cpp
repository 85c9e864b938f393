// The interpreter of programs, compiled for each instruction set.
#include <algorithm>

#include "matrix_products.h"
#include "program_elementwise.h"
#include "program_reductions.h"
#include "variants.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

template <class T>
class Interpreter {
 public:
  Interpreter(const Program& program, void* const* slots, const double* row, int threads)
      : memory_{program, slots, row}, threads_(threads) {}

  bool run() const {
    const Program& program = memory_.program;
    bool in_range = true;
    for (const Program::Step& step : program.steps) {
      switch (step.kind) {
        case Kind::kElementwise:
          ElementwiseKernel<T>::run(memory_, program.elementwise[step.index], threads_);
          break;
        case Kind::kMatrixProduct:
          product(program.products[step.index]);
          break;
        case Kind::kSum:
          SumKernel<T>::run(memory_, program.sums[step.index]);
          break;
        case Kind::kLookup:
          in_range &= LookupKernel<T>::run(memory_, program.lookups[step.index]);
          break;
        case Kind::kRecurrence:
          recurrence(program.recurrences[step.index]);
          break;
        case Kind::kConvolution:
          convolution(program.convolutions[step.index]);
          break;
      }
    }
    return in_range;
  }

 private:
  void product(const MatrixProduct& product) const {
    if (product.m == 0 || product.n == 0) return;
    const bool small =
        threads_ > 1 && product.m * product.n * std::max<int64_t>(1, product.k) < kParallelProducts;
    const OneBlasThread alone(small);
    for (int64_t i = 0; i < product.batch; ++i) {
      multiply<T>(
          {product.transpose_a, product.transpose_b, product.m, product.n, product.k,
           static_cast<T>(memory_.constant(product.alpha)), memory_.at(product.a) + i * product.a.strides[0],
           product.lda, memory_.at(product.b) + i * product.b.strides[0], product.ldb,
           static_cast<T>(memory_.constant(product.beta)), memory_.at(product.c) + i * product.c.strides[0],
           product.ldc},
          small ? 1 : threads_);
    }
  }

  void recurrence(const RecurrenceStep& step) const {
    void* tensors[kMostRecurrentTensors];
    std::transform(step.tensors.begin(), step.tensors.end(), tensors,
                   [this](const Place& place) { return place.slot < 0 ? nullptr : memory_.at(place); });
    run_recurrence(step.recurrence, tensors, threads_);
  }

  void convolution(const ConvolutionStep& step) const {
    ConvolutionPair pairs[kMostConvolutionPairs];
    const int64_t count = static_cast<int64_t>(step.pairs.size());
    for (int64_t i = 0; i < count; ++i)
      pairs[i] = {memory_.at(step.pairs[i][0]), memory_.at(step.pairs[i][1])};
    run_convolution(step.convolution, {pairs, count}, memory_.at(step.to), threads_);
  }

  const ProgramMemory<T> memory_;
  const int threads_;
};

}  // namespace

bool run_program(const Program& program, void* const* slots, const double* row, int threads) {
  return program.wide ? Interpreter<double>(program, slots, row, threads).run()
                      : Interpreter<float>(program, slots, row, threads).run();
}

}  // namespace HVP_VARIANT
}  // namespace hvp
