// Sums and largest elements along extents, and lookups of rows by index, as operations of programs.
#pragma once

#include <algorithm>
#include <limits>

#include "dtypes.h"
#include "program_memory.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

template <class T>
class SumKernel {
 public:
  // For each index of the kept extents but the last: the sums of a block of the last extent at once.
  static void run(const ProgramMemory<T>& memory, const Sum& sum) {
    const int64_t last = sum.extents - 1, width = sum.sizes[last];
    int64_t kept = 1, summed = 1;
    for (int64_t d = 0; d < sum.kept; ++d) kept *= sum.sizes[d];
    for (int64_t d = sum.kept; d < last; ++d) summed *= sum.sizes[d];
    const int64_t from_stride = sum.from.strides[last], to_stride = sum.to.strides[last];
    // Along one line of memory where a line is what is summed; otherwise line by line.
    const bool along = width == 1 && summed > 0;
    const int64_t length = along ? sum.sizes[last - 1] : 1, line = along ? sum.from.strides[last - 1] : 0;
    const int64_t lines = along && length > 0 ? summed / length : summed;
    const int64_t outer = along ? last - 1 : last;
    for (int64_t i = 0; i < kept; ++i) {
      const T* from = memory.at(sum.from);
      T* to = memory.at(sum.to);
      for (int64_t d = sum.kept - 1, rest = i; d >= 0; --d) {
        from += rest % sum.sizes[d] * sum.from.strides[d];
        to += rest % sum.sizes[d] * sum.to.strides[d];
        rest /= sum.sizes[d];
      }
      for (int64_t first = 0; first < width; first += kColumns) {
        const int64_t n = std::min(kColumns, width - first);
        double totals[kColumns];
        std::fill(totals, totals + n, sum.largest ? -std::numeric_limits<double>::infinity() : 0.0);
        for (int64_t j = 0; j < lines; ++j) {
          const T* here = from + first * from_stride;
          for (int64_t d = outer - 1, rest = j; d >= sum.kept; --d) {
            here += rest % sum.sizes[d] * sum.from.strides[d];
            rest /= sum.sizes[d];
          }
          if (sum.largest) {
            const int64_t count = along ? length : n, stride = along ? line : from_stride;
            for (int64_t i = 0; i < count; ++i) keep_larger(totals[along ? 0 : i], here[i * stride]);
          } else if (along) {
            totals[0] += total(here, line, length);
          } else {
            add(here, from_stride, totals, n);
          }
        }
        for (int64_t j = 0; j < n; ++j) to[(first + j) * to_stride] = static_cast<T>(totals[j]);
      }
    }
  }

 private:
  static constexpr int64_t kColumns = 256;

  // NaN, once found, stays.
  static HVP_INLINE void keep_larger(double& largest, double value) {
    if (value > largest || value != value) largest = value;
  }

  static HVP_INLINE void add(const T* from, int64_t stride, double* totals, int64_t n) {
    if (stride == 1) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) totals[i] += static_cast<double>(from[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) totals[i] += static_cast<double>(from[i * stride]);
    }
  }

  static HVP_INLINE double total(const T* from, int64_t stride, int64_t n) {
    double sum = 0;
    if (stride == 1) {
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(from[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(from[i * stride]);
    }
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
