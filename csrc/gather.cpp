#include "gather.h"

#include <algorithm>
#include <cstring>

namespace hvp {
namespace {

// `Word` is an unsigned integer as wide as an element.
template <class Word>
void gather_words(const Word* data, const Walk& walk, int64_t start, int64_t count, Word* out) {
  const size_t inner = walk.extents.size() - 1;
  std::vector<int64_t> index(walk.extents.size());
  const Word* row = data;  // of index[inner] == 0
  int64_t rest = start;
  for (size_t d = inner + 1; d-- > 0;) {
    index[d] = rest % walk.extents[d];
    rest /= walk.extents[d];
    if (d != inner) row += index[d] * walk.strides[d];
  }
  const int64_t stride = walk.strides[inner];
  while (count > 0) {
    const int64_t run = std::min(count, walk.extents[inner] - index[inner]);
    const Word* from = row + index[inner] * stride;
    if (stride == 1) {
      std::memcpy(out, from, static_cast<size_t>(run) * sizeof(Word));
    } else {
      for (int64_t i = 0; i < run; ++i) out[i] = from[i * stride];
    }
    out += run;
    count -= run;
    index[inner] = 0;
    for (size_t d = inner; d-- > 0;) {
      row += walk.strides[d];
      if (++index[d] < walk.extents[d]) break;
      row -= walk.extents[d] * walk.strides[d];
      index[d] = 0;
    }
  }
}

}  // namespace

Walk walk_of(const std::vector<int64_t>& order, const int64_t* shape, const int64_t* strides) {
  Walk walk;
  for (const int64_t d : order) {
    if (shape[d] == 1) continue;
    if (!walk.extents.empty() && walk.strides.back() == shape[d] * strides[d]) {
      walk.extents.back() *= shape[d];
      walk.strides.back() = strides[d];
    } else {
      walk.extents.push_back(shape[d]);
      walk.strides.push_back(strides[d]);
    }
  }
  if (walk.extents.empty()) walk = {{1}, {1}};
  return walk;
}

void gather(const void* data, const Walk& walk, int64_t width, int64_t start, int64_t count, void* out) {
  const auto words = [&](auto word) {
    using Word = decltype(word);
    gather_words(static_cast<const Word*>(data), walk, start, count, static_cast<Word*>(out));
  };
  switch (width) {
    case 2:
      return words(uint16_t{});
    case 4:
      return words(uint32_t{});
    default:
      return words(uint64_t{});
  }
}

}  // namespace hvp
