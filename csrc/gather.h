// Reads a tensor whose strides are not those of the state: autograd returns products of some convolutions,
// and expanded tensors, with strides of their own.
#pragma once

#include <cstdint>
#include <vector>

namespace hvp {

// A tensor's dimensions, from the outermost to the innermost in the order in which the state stores them.
// Those of extent 1 are left out, and neighbours that one stride can walk are merged: a (2, 3) tensor with
// strides (3, 1) is one dimension of extent 6 and stride 1; with strides (1, 2) it stays two. Strides are in
// elements.
struct Walk {
  std::vector<int64_t> extents, strides;
};

Walk walk_of(const std::vector<int64_t>& order, const int64_t* shape, const int64_t* strides);

// Copies the elements [start, start + count) of the walk, `width` bytes each, to `out`.
void gather(const void* data, const Walk& walk, int64_t width, int64_t start, int64_t count, void* out);

}  // namespace hvp
