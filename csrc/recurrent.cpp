#include "recurrent.h"

#include <array>
#include <cstddef>
#include <numeric>

namespace hvp {
namespace {

constexpr RecurrentTensor takes(char kind, int64_t blocks = 1) { return {kind, blocks, false, false}; }
constexpr RecurrentTensor may_take(char kind, int64_t blocks = 1) { return {kind, blocks, true, false}; }
constexpr RecurrentTensor gives(char kind, int64_t blocks = 1) { return {kind, blocks, false, true}; }
constexpr RecurrentTensor may_give(char kind, int64_t blocks = 1) { return {kind, blocks, true, true}; }

template <typename... Tensors>
std::vector<RecurrentTensor> row(Tensors... tensors) {
  static_assert(sizeof...(tensors) <= kMostRecurrentTensors, "a step of a program has no room for them");
  return {tensors...};
}

}  // namespace

const std::vector<RecurrentTensor>& recurrence_tensors(RecurrentCode code) {
  static const std::array<std::vector<RecurrentTensor>, static_cast<std::size_t>(RecurrentCode::kCount)>
      tables = {{
          row(takes('N', 4), takes('T', 4), takes('B'), takes('B'), gives('N'), gives('B'), gives('B'),
              gives('N'), gives('N', 4), gives('N'), gives('N')),
          row(may_take('N'), may_take('B'), may_take('B'), may_take('N'), may_take('N', 4), may_take('N'),
              may_take('N'), takes('W', 4), takes('N', 4), takes('N'), takes('N'), gives('N', 4), gives('B'),
              gives('B'), may_give('N'), may_give('N')),
          row(takes('N', 4), takes('B'), takes('B'), takes('T', 4), takes('N', 4), takes('N'), takes('N'),
              takes('N'), takes('N'), gives('N'), gives('B'), gives('B'), gives('N'), gives('N', 4),
              gives('N'), gives('N')),
          row(takes('N', 3), takes('T', 3), may_take('V', 3), takes('B'), gives('N'), gives('B'), gives('N'),
              gives('N', 4)),
          row(may_take('N'), may_take('B'), may_take('N'), may_take('N', 4), takes('W', 3), takes('N'),
              takes('N', 4), gives('N', 3), gives('N', 3), gives('B'), may_give('N')),
          row(takes('N', 3), takes('N', 3), takes('B'), takes('T', 3), takes('N'), takes('N', 4),
              takes('N', 3), takes('N'), gives('N'), gives('B'), gives('N'), gives('N'), gives('N', 4)),
      }};
  return tables[static_cast<std::size_t>(code)];
}

int64_t RecurrentLayer::rows_of(const RecurrentTensor& tensor) const {
  switch (tensor.kind) {
    case 'N':
      return std::accumulate(batch_sizes.begin(), batch_sizes.end(), int64_t{0});
    case 'B':
      return batch_sizes.front();
    case 'W':
      return tensor.blocks * units;
    case 'T':
      return units;
  }
  return 1;
}

int64_t RecurrentLayer::columns_of(const RecurrentTensor& tensor) const {
  return tensor.kind == 'W' ? units : tensor.blocks * units;
}

bool packed(const std::vector<int64_t>& batch_sizes) {
  if (batch_sizes.empty() || batch_sizes.back() < 1) return false;
  for (std::size_t t = 1; t < batch_sizes.size(); ++t) {
    if (batch_sizes[t] > batch_sizes[t - 1]) return false;
  }
  return true;
}

}  // namespace hvp
