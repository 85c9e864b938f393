// Reads a tensor that is not stored in the order of the state: autograd returns the products of some
// convolutions, and whatever it expands, with strides of its own.
#pragma once

#include <cstdint>
#include <vector>

namespace hvp {

// A tensor's dimensions from the outermost to the innermost of the state's storage order; none has extent 1,
// and neighbours that one stride serves are one. Strides are in elements.
struct Walk {
  std::vector<int64_t> extents, strides;
};

Walk walk_of(const std::vector<int64_t>& order, const int64_t* shape, const int64_t* strides);

// Copies the elements [start, start + count) of the walk, `width` bytes each, to `out`.
void gather(const void* data, const Walk& walk, int64_t width, int64_t start, int64_t count, void* out);

}  // namespace hvp
