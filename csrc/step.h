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
};

}  // namespace hvp
