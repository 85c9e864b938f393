// What every recurrence needs: rows of its tensors, its times one after another, products with the state.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "elementary_functions.h"
#include "matrix_products.h"
#include "recurrent.h"
#include "variants.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

// Below so many numbers of a state, at all times together, one thread is faster than waking others.
constexpr int64_t kParallelStates = int64_t{1} << 14;
// Multiplications for one number of a product before it is stored.
constexpr int64_t kLongest = 512;
// Sequences from which a thread of its own pays.
constexpr int64_t kLeastShare = 4;

// Rows of a tensor; those of one that is missing are all the same memory.
template <class T>
struct Rows {
  T* data;
  int64_t step;
  T* at(int64_t row) const { return data + row * step; }
};

template <class T>
class RecurrentRun {
 public:
  RecurrentRun(const RecurrentLayer& recurrence, void* const* tensors, int threads)
      : r_(recurrence),
        h_(recurrence.units),
        table_(recurrence_tensors(recurrence.code)),
        tensors_(tensors),
        zeros_(static_cast<size_t>(4 * recurrence.units)) {
    const int64_t sequences = r_.batch_sizes.front();
    const int64_t rows = std::accumulate(r_.batch_sizes.begin(), r_.batch_sizes.end(), int64_t{0});
    const int64_t most = rows * h_ < kParallelStates ? 1 : threads;
    shares_ = std::max<int64_t>(1, std::min(most, sequences / kLeastShare));
    product_threads_ = shares_ > 1 ? 1 : static_cast<int>(most);
  }

 protected:
  // A tensor by its place in the table: what is taken and missing is zeros.
  Rows<T> rows(int index) {
    auto* const data = static_cast<T*>(tensors_[index]);
    return data == nullptr ? Rows<T>{zeros_.data(), 0} : Rows<T>{data, r_.columns_of(table_[index])};
  }

  // Fills the state at `to` with the tensor at `from`.
  T* state(int to, int from) {
    auto* const data = static_cast<T*>(tensors_[to]);
    const size_t count = static_cast<size_t>(r_.batch_sizes.front() * h_);
    if (tensors_[from] == nullptr) {
      std::fill(data, data + count, T(0));
    } else {
      std::memcpy(data, tensors_[from], count * sizeof(T));
    }
    return data;
  }

  // Calls step(row, sequence, count) for each time, in the order of the recurrence or backwards: `count` rows
  // from `row` on are those of as many sequences. Each thread has sequences of its own.
  template <class Step>
  void each_time(bool backwards, const Step& step) {
    const int64_t times = static_cast<int64_t>(r_.batch_sizes.size()), sequences = r_.batch_sizes.front();
    const bool down = r_.reverse != backwards;
    const auto share = [&](int64_t s) {
      const OneBlasThread alone(product_threads_ == 1);
      const int64_t first = sequences * s / shares_, last = sequences * (s + 1) / shares_;
      int64_t row = down ? std::accumulate(r_.batch_sizes.begin(), r_.batch_sizes.end(), int64_t{0}) : 0;
      for (int64_t i = 0; i < times; ++i) {
        const int64_t size = r_.batch_sizes[static_cast<size_t>(down ? times - 1 - i : i)];
        if (down) row -= size;
        if (first < std::min(last, size)) step(row + first, first, std::min(last, size) - first);
        if (!down) row += size;
      }
    };
    if (shares_ == 1) return share(0);
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(shares_))
    for (int64_t s = 0; s < shares_; ++s) share(s);
  }

  // to (count x columns, `step` apart) += from (count x inner) times matrix (inner x columns). In pieces of
  // the inner extent, so that what the sequences share stays in the second-level cache.
  void add_product(const T* from, int64_t inner, const T* matrix, int64_t columns, T* to, int64_t step,
                   int64_t count) const {
    const int64_t pieces = (inner + kLongest - 1) / kLongest;
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t first = inner * i / pieces, last = inner * (i + 1) / pieces;
      multiply<T>({false, false, columns, count, last - first, T(1), matrix + first * columns, columns,
                   from + first, inner, T(1), to, step},
                  product_threads_);
    }
  }

  void copy(const T* from, T* to, int64_t count) const {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
  }

  const RecurrentLayer& r_;
  const int64_t h_;
  const std::vector<RecurrentTensor>& table_;
  void* const* const tensors_;
  std::vector<T> zeros_;
  int64_t shares_;
  int product_threads_;
};

}  // namespace
}  // namespace HVP_VARIANT
}  // namespace hvp
