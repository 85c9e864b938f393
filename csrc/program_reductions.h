// Sums and largest elements along extents, and lookups of rows by index, as operations of programs.
#pragma once

#include <algorithm>
#include <limits>

#include "dtypes.h"
#include "program_memory.h"
#include "vectors.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

template <class T>
class SumKernel {
 public:
  static void run(const ProgramMemory<T>& memory, const Sum& sum) {
    sum.product ? run<true>(memory, sum) : run<false>(memory, sum);
  }

 private:
  static constexpr int64_t kBlock = 256;

  // Numbers of a line, and the factors that each is multiplied by.
  struct Line {
    const T *from, *factor;
    int64_t from_stride, factor_stride, count;

    bool dense(bool product) const { return from_stride == 1 && (!product || factor_stride == 1); }
  };

  // Where what is summed is a line of memory, line by line, as they follow one another in memory, for a block
  // of indices of the kept extents; otherwise, for each of these, a block of the last extent at once.
  template <bool product>
  static void run(const ProgramMemory<T>& memory, const Sum& sum) {
    const int64_t last = sum.extents - 1, width = sum.sizes[last];
    int64_t kept = 1, summed = 1;
    for (int64_t d = 0; d < sum.kept; ++d) kept *= sum.sizes[d];
    for (int64_t d = sum.kept; d < last; ++d) summed *= sum.sizes[d];
    const bool along = width == 1 && summed > 0;
    const int64_t outer = along ? last - 1 : last, lines = along ? summed / sum.sizes[outer] : summed;
    const auto line = [&](int64_t i, int64_t j, int64_t first, int64_t count) {
      const auto at = [&](const Place& place) {
        return memory.at(place) + offset(sum, place, 0, sum.kept, i) +
               offset(sum, place, sum.kept, outer, j) + first * place.strides[last];
      };
      return Line{at(sum.from), product ? at(sum.factor) : nullptr, sum.from.strides[outer],
                  sum.factor.strides[outer], count};
    };
    const auto result = [&](int64_t i) { return memory.at(sum.to) + offset(sum, sum.to, 0, sum.kept, i); };
    double totals[kBlock];
    const auto begin = [&](int64_t n) {
      std::fill(totals, totals + n, sum.largest ? -std::numeric_limits<double>::infinity() : 0.0);
    };
    for (int64_t i = 0; along && i < kept; i += kBlock) {
      const int64_t n = std::min(kBlock, kept - i);
      begin(n);
      for (int64_t j = 0; j < lines; ++j) {
        for (int64_t k = 0; k < n; ++k) {
          const Line numbers = line(i + k, j, 0, sum.sizes[outer]);
          sum.largest ? keep_largest(numbers, totals + k) : void(totals[k] += total<product>(numbers));
        }
      }
      for (int64_t k = 0; k < n; ++k) *result(i + k) = static_cast<T>(totals[k]);
    }
    for (int64_t i = 0; !along && i < kept; ++i) {
      for (int64_t first = 0; first < width; first += kBlock) {
        const int64_t n = std::min(kBlock, width - first);
        begin(n);
        for (int64_t j = 0; j < lines; ++j) {
          const Line numbers = line(i, j, first, n);
          sum.largest ? keep_larger(numbers, totals) : add<product>(numbers, totals);
        }
        T* const to = result(i) + first * sum.to.strides[last];
        for (int64_t j = 0; j < n; ++j) to[j * sum.to.strides[last]] = static_cast<T>(totals[j]);
      }
    }
  }

  // Of the `number`th index of extents [begin, end).
  static HVP_INLINE int64_t offset(const Sum& sum, const Place& place, int64_t begin, int64_t end,
                                   int64_t number) {
    int64_t found = 0;
    for (int64_t d = end - 1; d > begin; --d) {
      found += number % sum.sizes[d] * place.strides[d];
      number /= sum.sizes[d];
    }
    return end > begin ? found + number * place.strides[begin] : 0;  // mostly there is one, and no division
  }

  // NaN, once found, stays.
  static HVP_INLINE void keep_larger(double value, double* largest) {
    if (value > *largest || value != value) *largest = value;
  }

  static HVP_INLINE void keep_largest(const Line& line, double* largest) {
    for (int64_t i = 0; i < line.count; ++i) keep_larger(line.from[i * line.from_stride], largest);
  }

  static HVP_INLINE void keep_larger(const Line& line, double* largest) {
    for (int64_t i = 0; i < line.count; ++i) keep_larger(line.from[i * line.from_stride], largest + i);
  }

  template <bool product>
  static HVP_INLINE T number(const Line& line, int64_t i, int64_t from_stride, int64_t factor_stride) {
    const T from = line.from[i * from_stride];
    return product ? from * line.factor[i * factor_stride] : from;
  }

  template <bool product>
  static HVP_INLINE void add(const Line& line, double* totals) {
    if (line.dense(product)) {
#pragma omp simd
      for (int64_t i = 0; i < line.count; ++i)
        totals[i] += static_cast<double>(number<product>(line, i, 1, 1));
    } else {
      for (int64_t i = 0; i < line.count; ++i)
        totals[i] += static_cast<double>(number<product>(line, i, line.from_stride, line.factor_stride));
    }
  }

  // Eight numbers at a time are added as they are, in pairs, before they become float64.
  template <bool product>
  static HVP_INLINE double total(const Line& line) {
    constexpr int64_t kLanes = Vectors<T>::kLanes, kTogether = 8 * kLanes;
    double sums[kLanes] = {}, sum = 0;
    int64_t i = 0;
    for (; line.dense(product) && i + kTogether <= line.count; i += kTogether) {
      Vector<T> parts[8];
      for (int k = 0; k < 8; ++k) {
        parts[k] = load<Vector<T>>(line.from + i + k * kLanes);
        if (product) parts[k] *= load<Vector<T>>(line.factor + i + k * kLanes);
      }
      for (int half = 4; half > 0; half /= 2) {
        for (int k = 0; k < half; ++k) parts[k] += parts[k + half];
      }
#pragma omp simd
      for (int64_t l = 0; l < kLanes; ++l) sums[l] += static_cast<double>(parts[0][l]);
    }
    for (; i < line.count; ++i)
      sum += static_cast<double>(number<product>(line, i, line.from_stride, line.factor_stride));
    for (int64_t l = 0; l < kLanes; ++l) sum += sums[l];
    return sum;
  }
};

template <class T>
class LookupKernel {
 public:
  // False if an index is out of range.
  static bool run(const ProgramMemory<T>& memory, const Lookup& lookup) {
    const auto* const index =
        static_cast<const int64_t*>(memory.slots[lookup.index.slot]) + lookup.index.offset;
    if (lookup.sizes[0] == 1 && lookup.sizes[2] == 1) return numbers(memory, lookup, index);
    bool in_range = true;
    for (int64_t i = 0; i < lookup.sizes[0]; ++i) {
      for (int64_t j = 0; j < lookup.sizes[1]; ++j) {
        const int64_t row = index[j * lookup.index.strides[0]];
        const bool skipped = row == lookup.skipped;
        if (!skipped && (row < 0 || row >= lookup.rows)) {
          in_range = false;
          continue;
        }
        if (skipped && lookup.scatter) continue;
        const int64_t chosen = skipped ? 0 : row;
        const int64_t from_row = lookup.scatter ? j : chosen, to_row = lookup.scatter ? chosen : j;
        const int64_t from_start = lookup.scatter ? 0 : j * lookup.from.strides[3];
        const int64_t to_start = lookup.scatter ? j * lookup.to.strides[3] : 0;
        const T* const from = memory.at(lookup.from) + i * lookup.from.strides[0] +
                              from_row * lookup.from.strides[1] + from_start;
        T* const to =
            memory.at(lookup.to) + i * lookup.to.strides[0] + to_row * lookup.to.strides[1] + to_start;
        const int64_t a = lookup.from.strides[2], b = lookup.to.strides[2];
        if (skipped) {
          for (int64_t k = 0; k < lookup.sizes[2]; ++k) to[k * b] = T(0);
        } else if (!lookup.scatter) {
          for (int64_t k = 0; k < lookup.sizes[2]; ++k) to[k * b] = from[k * a];
        } else {
          for (int64_t k = 0; k < lookup.sizes[2]; ++k) to[k * b] += from[k * a];
        }
      }
    }
    return in_range;
  }

 private:
  // One number for each index, as of max-pooling.
  static bool numbers(const ProgramMemory<T>& memory, const Lookup& lookup, const int64_t* index) {
    const T* const from = memory.at(lookup.from);
    T* const to = memory.at(lookup.to);
    const int64_t step = lookup.index.strides[0],
                  row_step = (lookup.scatter ? lookup.to : lookup.from).strides[1];
    const int64_t table_step = (lookup.scatter ? lookup.to : lookup.from).strides[3];
    const int64_t chosen_step = (lookup.scatter ? lookup.from : lookup.to).strides[1];
    bool in_range = true;
    for (int64_t j = 0; j < lookup.sizes[1]; ++j) {
      const int64_t row = index[j * step];
      const bool chosen = row >= 0 && row < lookup.rows && row != lookup.skipped;
      in_range &= chosen || row == lookup.skipped;
      const int64_t place = chosen ? row * row_step + j * table_step : 0;
      if (!lookup.scatter) {
        if (chosen || row == lookup.skipped) to[j * chosen_step] = chosen ? from[place] : T(0);
      } else if (chosen) {
        to[place] += from[j * chosen_step];
      }
    }
    return in_range;
  }
};

}  // namespace
}  // namespace HVP_VARIANT
}  // namespace hvp
