// A straight-line program on tensors of one floating type: what a Hessian-vector product and a solver's
// update do in one term. hvp_engine.differentiation.native makes programs; the interpreter runs them, for all
// terms in one call.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "convolution.h"
#include "recurrent.h"

namespace hvp {

constexpr int kMaxExtents = 6;
constexpr int kMaxInputs = 12;     // of an elementwise operation
constexpr int kMaxRegisters = 32;  // inputs included

struct ProgramError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Elements of a slot: where the first is, and the distance of neighbours along each extent.
struct Place {
  int64_t slot, offset;
  std::array<int64_t, kMaxExtents> strides{};
};

enum class Code : int64_t {
  kMultiply,         // a * b
  kAdd,              // a + b
  kSubtract,         // a - b
  kDivide,           // a / b
  kMultiplyAdd,      // a * b + c
  kScale,            // a * constant
  kShift,            // a + constant
  kFill,             // constant
  kSelect,           // a where b is not zero, else 0
  kSelectAbove,      // 0 where b <= constant, else a
  kTanhGradient,     // a * (1 - b * b)
  kSigmoidGradient,  // a * (1 - b) * b
  kExponential,      // e^a
  kLogarithm,        // log(a)
  kSquareRoot,       // sqrt(a)
  kTanh,             // tanh(a)
  kSigmoid,          // 1 / (1 + e^-a)
  kAffine,           // a * constant + second
  kCount,
};

inline bool has_constant(Code code) {
  return code == Code::kScale || code == Code::kShift || code == Code::kFill || code == Code::kSelectAbove ||
         code == Code::kAffine;
}

// `to`, `a`, `b` and `c` are registers, of which the first hold the inputs. A constant is a column of the
// table of the run if it is >= 0, else number -1 - constant of the program's own.
struct Instruction {
  Code code;
  int64_t to, a, b, c, constant, second;
};

struct Output {
  int64_t source;  // a register
  Place place;
  bool direct;  // whether the register can be the memory itself
};

// Block by block: loads the inputs, runs the instructions on them, stores the outputs. What is between stays
// in the first-level cache.
struct Elementwise {
  int64_t extents;
  std::array<int64_t, kMaxExtents> sizes{};
  std::vector<Place> inputs;
  std::vector<Output> outputs;
  std::vector<Instruction> instructions;
  int64_t registers;
};

// Column-major as in BLAS: c (m x n) <- alpha a b + beta c, `batch` times.
struct MatrixProduct {
  int64_t m, n, k, batch;
  bool transpose_a, transpose_b;
  int64_t lda, ldb, ldc;
  int64_t alpha, beta;  // constants
  Place a, b, c;        // strides[0] is between one matrix of the batch and the next
};

// Sums, of numbers or of products of two, or the largest numbers, over extents [kept, extents - 1), for each
// index of the others; of more than a few numbers sums are made in float64.
struct Sum {
  bool largest, product;
  int64_t extents, kept;
  std::array<int64_t, kMaxExtents> sizes{};
  Place from, factor, to;  // without a product the factor is not read
};

// to[i, j, k] = from[i, index[j], k], or the other way round: to[i, index[j], k] += from[i, j, k]. Where the
// index is `skipped`, the first gives 0 and the second adds nothing. The table, which the index chooses from,
// may begin elsewhere for each j: strides[3] is the distance, so with 10 and rows of stride 1 it gives
// to[j] = from[j][index[j]] for a matrix of 10 columns.
struct Lookup {
  bool scatter;
  std::array<int64_t, 3> sizes;
  int64_t rows;           // that the index may choose from
  int64_t skipped;        // the least number there is where none is
  Place index, from, to;  // the index has strides[0]
};

enum class Kind : int64_t { kElementwise, kMatrixProduct, kSum, kLookup, kRecurrence, kConvolution };

// A derivative of a recurrent layer; a tensor that is missing has slot -1.
struct RecurrenceStep {
  RecurrentLayer recurrence;
  std::vector<Place> tensors;
};

struct ConvolutionStep {
  Convolution convolution;
  std::vector<std::array<Place, 2>> pairs;  // of what it multiplies
  Place to;
};

// What a slot holds: numbers of the program's type, indices of type int64, or what no operation reads.
enum class Element : int { kNumber, kIndex, kOther };

struct SlotSpec {
  Element element;
  int64_t numel;  // elements from the first to the last, gaps included
};

struct Program {
  struct Step {
    Kind kind;
    size_t index;  // in the list of its kind
  };
  bool wide = false;       // float64
  int64_t parameters = 0;  // columns of the table of a run
  std::vector<SlotSpec> slots;
  std::vector<double> constants;
  std::vector<Step> steps;
  std::vector<Elementwise> elementwise;
  std::vector<MatrixProduct> products;
  std::vector<Sum> sums;
  std::vector<Lookup> lookups;
  std::vector<RecurrenceStep> recurrences;
  std::vector<ConvolutionStep> convolutions;
  std::vector<bool> used;  // slots

  // Reads the program that Python wrote; throws ProgramError for one that would leave the memory of its
  // slots.
  static Program parse(bool wide, int64_t parameters, std::vector<SlotSpec> slots,
                       std::vector<double> constants, const std::vector<int64_t>& words);
};

// All steps once; `row` is a row of the table. Returns false if an index was out of range.
using ProgramKernel = bool (*)(const Program& program, void* const* slots, const double* row, int threads);

}  // namespace hvp
