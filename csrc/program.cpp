// Programs from their words, as hvp_engine.differentiation.native writes them.
#include "program.h"

#include <algorithm>
#include <limits>
#include <string>

#include "program_reader.h"

namespace hvp {
namespace {

int operands_of(Code code) {
  switch (code) {
    case Code::kFill:
      return 0;
    case Code::kScale:
    case Code::kShift:
    case Code::kExponential:
    case Code::kLogarithm:
    case Code::kSquareRoot:
    case Code::kTanh:
    case Code::kSigmoid:
    case Code::kAffine:
      return 1;
    case Code::kMultiplyAdd:
      return 3;
    default:
      return 2;
  }
}

// Whether a register that is stored may be the memory itself: where no later instruction reads that memory as
// an input, and nothing else writes it.
bool can_be_direct(const Elementwise& operation, const Output& output) {
  if (output.source < static_cast<int64_t>(operation.inputs.size())) return false;
  int count = 0;
  for (const Output& other : operation.outputs) count += other.source == output.source;
  if (count > 1) return false;
  bool written = false;
  for (const Instruction& instruction : operation.instructions) {
    const int64_t operands[] = {instruction.a, instruction.b, instruction.c};
    for (int i = 0; i < operands_of(instruction.code) && written; ++i) {
      if (operands[i] < static_cast<int64_t>(operation.inputs.size()) &&
          operation.inputs[operands[i]].slot == output.place.slot) {
        return false;
      }
    }
    written |= instruction.to == output.source;
  }
  for (const Output& other :
       operation.outputs) {  // stored at the end, where an input must still be what it was
    if (other.source < static_cast<int64_t>(operation.inputs.size()) &&
        operation.inputs[other.source].slot == output.place.slot) {
      return false;
    }
  }
  return true;
}

Elementwise read_elementwise(ProgramReader& reader) {
  Elementwise operation;
  operation.extents = reader.extents();
  reader.sizes(operation.sizes, operation.extents);
  const int64_t inputs = reader.word(0, kMaxInputs, "inputs");
  for (int64_t i = 0; i < inputs; ++i) {
    operation.inputs.push_back(reader.place(operation.sizes, operation.extents));
  }
  const int64_t count = reader.word(0, kMaxRegisters, "instructions");
  std::vector<bool> known(kMaxRegisters, false);
  std::fill(known.begin(), known.begin() + inputs, true);
  const auto source = [&] {
    const int64_t register_ = reader.word(0, kMaxRegisters - 1, "register");
    if (!known[register_]) fail("register " + std::to_string(register_) + " is read before it is written");
    return register_;
  };
  operation.registers = inputs;
  for (int64_t i = 0; i < count; ++i) {
    Instruction instruction{};
    instruction.code = static_cast<Code>(reader.word(0, static_cast<int64_t>(Code::kCount) - 1, "code"));
    instruction.to = reader.word(inputs, kMaxRegisters - 1, "register");
    int64_t* const operands[] = {&instruction.a, &instruction.b, &instruction.c};
    for (int j = 0; j < operands_of(instruction.code); ++j) *operands[j] = source();
    if (has_constant(instruction.code)) instruction.constant = reader.constant();
    if (instruction.code == Code::kAffine) instruction.second = reader.constant();
    known[instruction.to] = true;
    operation.registers = std::max(operation.registers, instruction.to + 1);
    operation.instructions.push_back(instruction);
  }
  const int64_t outputs = reader.word(1, kMaxInputs, "outputs");
  for (int64_t i = 0; i < outputs; ++i) {
    Output output{};
    output.source = source();
    output.place = reader.place(operation.sizes, operation.extents);
    operation.outputs.push_back(output);
  }
  for (Output& output : operation.outputs) output.direct = can_be_direct(operation, output);
  return operation;
}

// One matrix of a product, columns first: `rows` x `columns` of them are read.
Place read_matrix(ProgramReader& reader, int64_t batch, int64_t rows, int64_t columns, int64_t leading) {
  const std::array<int64_t, 3> sizes = {batch, columns, rows};
  const Place place = reader.place(sizes, 3);
  if (place.strides[1] != leading || (rows > 1 && place.strides[2] != 1))
    fail("a matrix is not laid out for BLAS");
  return place;
}

MatrixProduct read_product(ProgramReader& reader) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  MatrixProduct product{};
  product.batch = reader.size();
  product.m = reader.word(0, kMost, "m");
  product.n = reader.word(0, kMost, "n");
  product.k = reader.word(0, kMost, "k");
  product.transpose_a = reader.word(0, 1, "transpose");
  product.transpose_b = reader.word(0, 1, "transpose");
  const int64_t rows_a = product.transpose_a ? product.k : product.m;
  const int64_t rows_b = product.transpose_b ? product.n : product.k;
  product.lda = reader.word(std::max<int64_t>(1, rows_a), kMost, "lda");
  product.ldb = reader.word(std::max<int64_t>(1, rows_b), kMost, "ldb");
  product.ldc = reader.word(std::max<int64_t>(1, product.m), kMost, "ldc");
  product.alpha = reader.constant();
  product.beta = reader.constant();
  product.a =
      read_matrix(reader, product.batch, rows_a, product.transpose_a ? product.m : product.k, product.lda);
  product.b =
      read_matrix(reader, product.batch, rows_b, product.transpose_b ? product.k : product.n, product.ldb);
  product.c = read_matrix(reader, product.batch, product.m, product.n, product.ldc);
  return product;
}

Sum read_sum(ProgramReader& reader) {
  Sum sum{};
  sum.largest = reader.word(0, 1, "largest");
  sum.product = reader.word(0, sum.largest ? 0 : 1, "product");
  sum.extents = reader.word(2, kMaxExtents, "extents");
  sum.kept = reader.word(0, sum.extents - 1, "kept");
  reader.sizes(sum.sizes, sum.extents);
  sum.from = reader.place(sum.sizes, sum.extents);
  sum.factor = sum.product ? reader.place(sum.sizes, sum.extents) : sum.from;
  std::array<int64_t, kMaxExtents> kept = sum.sizes;
  for (int64_t d = sum.kept; d < sum.extents - 1; ++d) kept[d] = 1;
  sum.to = reader.place(kept, sum.extents);
  return sum;
}

Lookup read_lookup(ProgramReader& reader) {
  Lookup lookup{};
  lookup.scatter = reader.word(0, 1, "scatter");
  reader.sizes(lookup.sizes, 3);
  lookup.rows = reader.size();
  lookup.skipped = reader.word();
  const std::array<int64_t, 1> count = {lookup.sizes[1]};
  const std::array<int64_t, 4> table = {lookup.sizes[0], lookup.rows, lookup.sizes[2], lookup.sizes[1]};
  lookup.index = reader.place(count, 1, Element::kIndex);
  const auto chosen = [&] { return reader.place(lookup.sizes, 3); };
  const auto chosen_from = [&] { return reader.place(table, 4); };
  lookup.from = lookup.scatter ? chosen() : chosen_from();
  lookup.to = lookup.scatter ? chosen_from() : chosen();
  return lookup;
}

RecurrenceStep read_recurrence(ProgramReader& reader, bool wide) {
  RecurrenceStep step{};
  RecurrentLayer& recurrence = step.recurrence;
  recurrence.wide = wide;
  recurrence.code =
      static_cast<RecurrentCode>(reader.word(0, static_cast<int64_t>(RecurrentCode::kCount) - 1, "code"));
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / 4;
  recurrence.units = reader.word(0, kMost, "units");
  recurrence.reverse = reader.word(0, 1, "reverse");
  const int64_t times = reader.word(1, kMost, "times");
  for (int64_t t = 0; t < times; ++t) recurrence.batch_sizes.push_back(reader.word(1, kMost, "batch size"));
  if (!packed(recurrence.batch_sizes)) fail("batch sizes grow");
  for (const RecurrentTensor& tensor : recurrence_tensors(recurrence.code)) {
    Place place{-1, 0, {}};
    if (reader.word(tensor.optional ? 0 : 1, 1, "presence") == 1) {
      place = reader.dense({recurrence.rows_of(tensor), recurrence.columns_of(tensor)});
    }
    step.tensors.push_back(place);
  }
  return step;
}

ConvolutionStep read_convolution(ProgramReader& reader, bool wide) {
  constexpr int64_t kMost = 1 << 20;
  constexpr int64_t kMostElements = std::numeric_limits<int32_t>::max();
  ConvolutionStep step{};
  Convolution& c = step.convolution;
  c.wide = wide;
  c.code =
      static_cast<ConvolutionCode>(reader.word(0, static_cast<int64_t>(ConvolutionCode::kCount) - 1, "code"));
  c.images = reader.word(1, kMost, "images");
  c.inputs = reader.word(1, kMost, "inputs");
  c.outputs = reader.word(1, kMost, "outputs");
  const auto both = [&](std::array<int64_t, 2>& numbers, int64_t least, const char* name) {
    for (int64_t& number : numbers) number = reader.word(least, kMost, name);
  };
  both(c.size, 1, "size");
  both(c.kernel, 1, "kernel");
  both(c.stride, 1, "stride");
  both(c.padding, 0, "padding");
  both(c.dilation, 1, "dilation");
  for (int d = 0; d < 2; ++d) {
    if (c.size[d] + 2 * c.padding[d] <= c.dilation[d] * (c.kernel[d] - 1))
      fail("a kernel is larger than images");
  }
  if (c.kernel[0] * c.kernel[1] > kMostElements / c.inputs ||
      c.made(0) * c.made(1) > kMostElements / c.outputs) {
    fail("a convolution is too large");
  }
  const auto x = c.of_images(), w = c.of_kernels(), y = c.of_outputs();
  const bool of_outputs = c.code == ConvolutionCode::kOutputs, of_images = c.code == ConvolutionCode::kImages;
  const int64_t pairs = reader.word(1, kMostConvolutionPairs, "pairs");
  for (int64_t i = 0; i < pairs; ++i) {
    const Place first = reader.dense(of_images ? y : x);
    step.pairs.push_back({first, reader.dense(of_outputs || of_images ? w : y)});
  }
  step.to = reader.dense(of_outputs ? y : of_images ? x : w);
  return step;
}

template <class T>
void add(Program& program, Kind kind, std::vector<T>& list, T&& operation) {
  program.steps.push_back({kind, list.size()});
  list.push_back(std::move(operation));
}

}  // namespace

Program Program::parse(bool wide, int64_t parameters, std::vector<SlotSpec> slots,
                       std::vector<double> constants, const std::vector<int64_t>& words) {
  Program program;
  program.wide = wide;
  program.parameters = parameters;
  program.slots = std::move(slots);
  program.constants = std::move(constants);
  program.used.assign(program.slots.size(), false);
  ProgramReader reader(program, words);
  while (reader.more()) {
    const Kind kind = static_cast<Kind>(reader.word(0, static_cast<int64_t>(Kind::kConvolution), "kind"));
    switch (kind) {
      case Kind::kElementwise:
        add(program, kind, program.elementwise, read_elementwise(reader));
        break;
      case Kind::kMatrixProduct:
        add(program, kind, program.products, read_product(reader));
        break;
      case Kind::kSum:
        add(program, kind, program.sums, read_sum(reader));
        break;
      case Kind::kLookup:
        add(program, kind, program.lookups, read_lookup(reader));
        break;
      case Kind::kRecurrence:
        add(program, kind, program.recurrences, read_recurrence(reader, wide));
        break;
      case Kind::kConvolution:
        add(program, kind, program.convolutions, read_convolution(reader, wide));
        break;
    }
  }
  return program;
}

}  // namespace hvp
