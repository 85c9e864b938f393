// A block of queries and all keys: scores, masks, weights, dropout and matrix products, which every level of
// attention is made of. What belongs to a pair of a query and a key stands in the order keys x queries: sums
// over keys then run along vectors of queries, and every matrix product has the one form that tiles of
// registers are fastest for.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention.h"
#include "elementary_functions.h"
#include "matrix_products.h"
#include "philox.h"
#include "variants.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

// Queries of a block: whole tiles of 3 vectors of 16 float32.
constexpr int64_t kBlock = 48;
constexpr int64_t kPadding = 16;
// Blocks that every level needs: weights; weights' gradients; moved scores and the gradients of those.
constexpr int64_t kBlocks[3] = {1, 2, 4};
constexpr int64_t kOperands[3] = {1, 2, 3};  // transposed blocks of queries and what is laid out as they are
constexpr int64_t kSums = 5;                 // rows of numbers, one for each query of a block

// Keys whose terms are added before the sum joins the others: of numbers, and in a matrix product.
constexpr int64_t kPart = 32, kLongPart = 128;

int64_t block_of(const Attention& p) {
  const int64_t padded = (p.queries + kPadding - 1) / kPadding * kPadding;
  return std::min(kBlock, padded);
}

template <class T>
class AttentionPairs {
 public:
  AttentionPairs(const Attention& attention, int level, T* workspace)
      : p_(attention), size_(block_of(attention)), has_blas_(blas().problem.empty()) {
    const int64_t pairs = p_.keys * size_;
    for (int64_t i = 0; i < kBlocks[level]; ++i, workspace += pairs) pairs_[i] = workspace;
    if (p_.dropout) {
      factors_ = workspace;
      workspace += pairs;
    }
    for (int64_t i = 0; i < kOperands[level]; ++i) {
      columns_[i] = workspace;
      workspace += std::max(p_.width, p_.value_width) * size_;
    }
    for (int64_t i = 0; i < kSums; ++i, workspace += size_) sums_[i] = workspace;
  }

 protected:
  static const T* rows(const AttentionRows& operand, int64_t batch, int64_t head) {
    if (operand.data == nullptr) return nullptr;
    return static_cast<const T*>(operand.data) + batch * operand.batch + head * operand.head;
  }

  const T* queries(const AttentionRows& operand) const {
    const T* const all = rows(operand, batch_, head_);
    return all == nullptr ? nullptr : all + first_ * operand.row;
  }

  // The block's rows of a result that is laid out as the queries.
  T* result(int index, int64_t width) const {
    return static_cast<T*>(p_.results[index]) + (index_ * p_.queries + first_) * width;
  }

  // The rows of a result for this head of keys.
  T* key_result(int index, int64_t width) const {
    return static_cast<T*>(p_.results[index]) + key_index_ * p_.keys * width;
  }

  // Row-major: to (n x m) <- alpha left (n x k) right (k x m) + beta to; `left` may be stored as k x n.
  void multiply(T alpha, const T* left, int64_t left_row, bool transposed, const T* right, int64_t right_row,
                T beta, T* to, int64_t to_row, int64_t n, int64_t m, int64_t k) const {
    if (n == 0 || m == 0) return;
    if (has_blas_) {
      HVP_VARIANT::multiply<T>(
          {false, transposed, m, n, k, alpha, right, right_row, left, left_row, beta, to, to_row}, 1);
      return;
    }
    const int64_t row = transposed ? 1 : left_row, column = transposed ? left_row : 1;
    for (int64_t i = 0; i < n; ++i) {
      T* const target = to + i * to_row;
      for (int64_t j = 0; j < m; ++j) target[j] = beta == T(0) ? T(0) : beta * target[j];
      for (int64_t x = 0; x < k; ++x) {
        const T factor = alpha * left[i * row + x * column];
        const T* const from = right + x * right_row;
#pragma omp simd
        for (int64_t j = 0; j < m; ++j) target[j] += factor * from[j];
      }
    }
  }

  // Pairs: to (keys x queries) <- alpha left (keys x width) columns (width x queries) + beta to.
  void to_pairs(T alpha, const T* left, int64_t row, const T* columns, int64_t width, T beta, T* to) const {
    multiply(alpha, left, row, false, columns, size_, beta, to, size_, keys_, size_, width);
  }

  // to (queries x width) <- alpha pairs^T right (keys x width) + beta to.
  void to_queries(T alpha, const T* pairs, const T* right, int64_t row, int64_t width, T beta, T* to) const {
    int64_t from = 0;
    do {  // in parts, whose sums round less than one long sum
      multiply(alpha, pairs + from * size_, size_, true, right + from * row, row, from == 0 ? beta : T(1), to,
               width, count_, width, std::min(kLongPart, keys_ - from));
      from += kLongPart;
    } while (from < keys_);
  }

  // to (keys x width) <- to + alpha pairs right (queries x width).
  void to_keys(T alpha, const T* pairs, const T* right, int64_t row, int64_t width, T* to) const {
    multiply(alpha, pairs, size_, false, right, row, T(1), to, width, keys_, width, count_);
  }

  // The block's rows as columns, with zeros for the queries that fill up the last block.
  const T* transposed(const AttentionRows& operand, int64_t width, int index) const {
    const T* const from = queries(operand);
    T* const to = columns_[index];
    for (int64_t x = 0; x < width; ++x) {
      for (int64_t i = 0; i < count_; ++i) to[x * size_ + i] = from[i * operand.row + x];
      for (int64_t i = count_; i < size_; ++i) to[x * size_ + i] = T(0);
    }
    return to;
  }

  // Scores, with -inf for what is not seen.
  void scores(const T* columns) const {
    T* const s = pairs_[0];
    to_pairs(static_cast<T>(p_.scale), key_, p_.key.row, columns, p_.width, T(0), s);
    if (p_.mask_kind != AttentionMask::kNone) mask();
    if (!p_.causal) return;
    for (int64_t j = first_; j < keys_; ++j) {
      std::fill(s + j * size_, s + j * size_ + std::min(size_, j - first_), kHidden);
    }
  }

  void mask() const {
    const bool added = p_.mask_kind == AttentionMask::kAdded;
    const int64_t start =
        batch_ * p_.mask_strides[0] + head_ * p_.mask_strides[1] + first_ * p_.mask_strides[2];
    const int64_t row = p_.mask_strides[2], column = p_.mask_strides[3];
    T* const s = pairs_[0];
    const auto apply = [&](auto read) {
      if (row == 0) {  // the same for all queries
        for (int64_t j = 0; j < keys_; ++j) {
          const T shift = read(j * column);
#pragma omp simd
          for (int64_t i = 0; i < size_; ++i) s[j * size_ + i] += shift;
        }
        return;
      }
      constexpr int64_t kTogether = 16;  // keys whose scores stay in the nearest cache
      for (int64_t from = 0; from < keys_; from += kTogether) {
        const int64_t to = std::min(keys_, from + kTogether);
        for (int64_t i = 0; i < count_; ++i) {
          for (int64_t j = from; j < to; ++j) s[j * size_ + i] += read(i * row + j * column);
        }
      }
    };
    if (added) {
      const T* const numbers = static_cast<const T*>(p_.mask) + start;
      apply([numbers](int64_t at) { return numbers[at]; });
    } else {
      const uint8_t* const bytes = static_cast<const uint8_t*>(p_.mask) + start;
      apply([bytes](int64_t at) { return bytes[at] != 0 ? T(0) : kHidden; });
    }
  }

  // The exponentials of the scores in place of them, each row's less its largest, and the rows' sums.
  void exponentials() const {
    T *const s = pairs_[0], *const largest = sums_[0];
    std::fill(largest, largest + size_, kHidden);
    int64_t j = 0;
    for (; j + 4 <= keys_; j += 4) {
      const T *const r0 = s + j * size_, *const r1 = r0 + size_, *const r2 = r1 + size_,
                     *const r3 = r2 + size_;
#pragma omp simd
      for (int64_t i = 0; i < size_; ++i) {
        const T x = r0[i] > r1[i] ? r0[i] : r1[i], y = r2[i] > r3[i] ? r2[i] : r3[i], z = x > y ? x : y;
        largest[i] = z > largest[i] ? z : largest[i];
      }
    }
    for (; j < keys_; ++j) {
      const T* const row = s + j * size_;
#pragma omp simd
      for (int64_t i = 0; i < size_; ++i) largest[i] = row[i] > largest[i] ? row[i] : largest[i];
    }
    for (int64_t i = 0; i < size_; ++i) largest[i] = largest[i] == kHidden ? T(0) : largest[i];
    add_keys(sums_[1], sums_[2], [s, largest, n = size_](int64_t j, T* part) {
      T* const row = s + j * n;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        row[i] = exponential_or_zero(row[i] - largest[i]);
        part[i] += row[i];
      }
    });
  }

  // sum <- what add(key, part) adds to `part` for each key: in parts, whose sums round less than one long
  // sum.
  template <class Add>
  void add_keys(T* sum, T* part, const Add& add) const {
    std::fill(sum, sum + size_, T(0));
    for (int64_t from = 0; from < keys_; from += kPart) {
      std::fill(part, part + size_, T(0));
      for (int64_t j = from; j < std::min(keys_, from + kPart); ++j) add(j, part);
      for (int64_t i = 0; i < size_; ++i) sum[i] += part[i];
    }
  }

  // The weights in place of the scores, but for one factor for each row: made again from the scores alone,
  // since a saved logarithm of the sum has been rounded, and is wrong by the same factor in a whole row.
  void unscaled_weights() const {
    exponentials();
    T *const total = sums_[1], *const factor = sums_[4];
    for (int64_t i = 0; i < size_; ++i) factor[i] = total[i] == T(0) ? T(0) : T(1) / total[i];
  }

  // Dropout's factors of the block.
  void draw() const {
    const T kept = p_.keep > 0 ? static_cast<T>(1 / p_.keep) : T(0);
    const auto head = static_cast<uint32_t>(index_);
    for (int64_t j = 0; j < keys_; j += 4) {
      T* rows[4];
      for (int64_t x = 0; x < 4; ++x) rows[x] = j + x < keys_ ? factors_ + (j + x) * size_ : sums_[x];
      T *const r0 = rows[0], *const r1 = rows[1], *const r2 = rows[2], *const r3 = rows[3];
#pragma omp simd
      for (int64_t i = 0; i < size_; ++i) {
        uint32_t words[4] = {static_cast<uint32_t>(j / 4), static_cast<uint32_t>(first_ + i), head, 0};
        philox(words, p_.seed);
        r0[i] = words[0] >= p_.threshold ? kept : T(0);
        r1[i] = words[1] >= p_.threshold ? kept : T(0);
        r2[i] = words[2] >= p_.threshold ? kept : T(0);
        r3[i] = words[3] >= p_.threshold ? kept : T(0);
      }
    }
  }

  // to <- to times dropout's factors.
  void drop(T* to) const {
    const int64_t n = keys_ * size_;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) to[i] *= factors_[i];
  }

  // mean <- sum over keys of weight x. The first one scales the weights.
  template <bool kFirst>
  void means(const T* x, T* mean) const {
    add_keys(mean, sums_[0], [x, weight = pairs_[0], factor = sums_[4], n = size_](int64_t j, T* part) {
      T* const w = weight + j * n;
      const T* const row = x + j * n;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        if (kFirst) w[i] *= factor[i];
        part[i] += w[i] * row[i];
      }
    });
  }

  static constexpr T kHidden = -std::numeric_limits<T>::infinity();

  const Attention& p_;
  const int64_t size_;
  const bool has_blas_;
  T *pairs_[4] = {}, *factors_ = nullptr, *columns_[3] = {}, *sums_[kSums] = {};
  int64_t batch_ = 0, head_ = 0, index_ = 0, key_index_ = 0, first_ = 0, count_ = 0, keys_ = 0;
  const T *key_ = nullptr, *value_ = nullptr, *grad_grad_key_ = nullptr, *grad_grad_value_ = nullptr;
};

}  // namespace
}  // namespace HVP_VARIANT
}  // namespace hvp
