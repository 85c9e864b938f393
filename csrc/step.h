// One call of an op: everything a device needs to run it.
#pragma once

#include <vector>

#include "gather.h"
#include "ops.h"

namespace hvp {

struct Part {
  int64_t numel;
  int64_t offset;  // of the tensor's first element in every state vector
  int64_t row;     // of the tensor's first chunk in partials
};

// The elements that are summed into one row of partials: a row of Layout.slices, on the state's device.
struct alignas(16) Slice {
  int64_t tensor;
  int64_t start;   // of its first element in the product
  int64_t offset;  // and in every state vector
  int64_t count;
};

struct Product {
  const void* data;
  DType dtype;
  Walk walk;  // empty if the elements are in the order of the state; always empty on a GPU
};

struct Step {
  OpCode op;
  bool wide;  // float64 state
  void* states[kMaxStates];
  const double* scalars[kMaxScalars];  // on the state's device
  double damping;
  double* partials;
  const std::vector<Part>& parts;
  const std::vector<Product>& products;
  int64_t rows;
  const Slice* slices;  // `rows` of them; only a GPU has them, and reads them
};

}  // namespace hvp
