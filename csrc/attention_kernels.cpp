// Attention on a CPU, compiled for each instruction set. A block of queries meets all keys at once, so that
// each row of weights is whole when its sums are needed. What belongs to a pair of a query and a key stands
// in the order keys x queries: sums over keys then run along vectors of queries, and every matrix product has
// the one form that tiles of registers are fastest for.
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
class Block {
 public:
  Block(const Attention& attention, int level, T* workspace)
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

  // All query heads of one head of keys.
  void run(int level, int64_t batch, int64_t key_head) {
    const int64_t group = p_.heads / p_.key_heads;
    batch_ = batch;
    key_ = rows(p_.key, batch, key_head);
    value_ = rows(p_.value, batch, key_head);
    grad_grad_key_ = rows(p_.grad_grad_key, batch, key_head);
    grad_grad_value_ = rows(p_.grad_grad_value, batch, key_head);
    key_index_ = batch * p_.key_heads + key_head;
    for (head_ = key_head * group; head_ < (key_head + 1) * group; ++head_) {
      index_ = batch * p_.heads + head_;
      for (first_ = 0; first_ < p_.queries; first_ += size_) {
        count_ = std::min(size_, p_.queries - first_);
        keys_ = p_.causal ? std::min(p_.keys, first_ + count_) : p_.keys;
        if (p_.dropout) draw();
        level == 0 ? value() : level == 1 ? backward() : backward_backward();
      }
    }
  }

 private:
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

  void value() const {
    T *const s = pairs_[0], *const largest = sums_[0], *const total = sums_[1];
    scores(transposed(p_.query, p_.width, 0));
    exponentials();
    if (p_.dropout) drop(s);
    T* const output = result(0, p_.value_width);
    to_queries(T(1), s, value_, p_.value.row, p_.value_width, T(0), output);
    T* const logarithms = static_cast<T*>(p_.results[1]) + index_ * p_.queries + first_;
    for (int64_t i = 0; i < count_; ++i) {
      const T factor = total[i] == T(0) ? T(0) : T(1) / total[i];
      logarithms[i] = total[i] == T(0) ? kHidden : largest[i] + std::log(total[i]);
      for (int64_t x = 0; x < p_.value_width; ++x) output[i * p_.value_width + x] *= factor;
    }
  }

  void backward() const {
    T *const weight = pairs_[0], *const gradient = pairs_[1], *const mean = sums_[1];
    const T scale = static_cast<T>(p_.scale), *const g = queries(p_.grad_output),
            *const q = queries(p_.query);
    scores(transposed(p_.query, p_.width, 0));
    unscaled_weights();
    to_pairs(T(1), value_, p_.value.row, transposed(p_.grad_output, p_.value_width, 1), p_.value_width, T(0),
             gradient);
    if (p_.dropout) drop(gradient);
    means<true>(gradient, mean);
    for (int64_t j = 0; j < keys_; ++j) {
      const T* const w = weight + j * size_;
      T* const d = gradient + j * size_;
#pragma omp simd
      for (int64_t i = 0; i < size_; ++i) d[i] = w[i] * (d[i] - mean[i]);
    }
    if (p_.dropout) drop(weight);
    to_queries(scale, gradient, key_, p_.key.row, p_.width, T(0), result(0, p_.width));
    to_keys(scale, gradient, q, p_.query.row, p_.width, key_result(1, p_.width));
    to_keys(T(1), weight, g, p_.grad_output.row, p_.value_width, key_result(2, p_.value_width));
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

  void backward_backward() const {
    T *const weight = pairs_[0], *const moved = pairs_[1], *const gradient = pairs_[2],
             *const second = pairs_[3];
    const T scale = static_cast<T>(p_.scale);
    const T *const g = queries(p_.grad_output), *const q = queries(p_.query),
                   *const a = queries(p_.grad_grad_query);
    const T* const columns = transposed(p_.query, p_.width, 0);
    scores(columns);
    unscaled_weights();
    const T* const g_columns = transposed(p_.grad_output, p_.value_width, 1);
    to_pairs(T(1), value_, p_.value.row, g_columns, p_.value_width, T(0), gradient);
    if (grad_grad_value_ != nullptr) {
      to_pairs(T(1), grad_grad_value_, p_.grad_grad_value.row, g_columns, p_.value_width, T(0), second);
    } else {
      std::fill(second, second + keys_ * size_, T(0));
    }
    if (a != nullptr) {
      to_pairs(scale, key_, p_.key.row, transposed(p_.grad_grad_query, p_.width, 2), p_.width, T(0), moved);
    } else {
      std::fill(moved, moved + keys_ * size_, T(0));
    }
    if (grad_grad_key_ != nullptr) {
      to_pairs(scale, grad_grad_key_, p_.grad_grad_key.row, columns, p_.width, T(1), moved);
    }
    if (p_.dropout) {
      drop(gradient);
      drop(second);
    }
    combine(weight, moved, gradient, second);
    T *const grad_grad_output = result(0, p_.value_width), *const grad_query = result(1, p_.width);
    T *const grad_key = key_result(2, p_.width), *const grad_value = key_result(3, p_.value_width);
    if (p_.dropout) {
      drop(moved);
      drop(weight);
    }
    to_queries(T(1), moved, value_, p_.value.row, p_.value_width, T(0), grad_grad_output);
    if (grad_grad_value_ != nullptr) {
      to_queries(T(1), weight, grad_grad_value_, p_.grad_grad_value.row, p_.value_width, T(1),
                 grad_grad_output);
    }
    to_keys(T(1), moved, g, p_.grad_output.row, p_.value_width, grad_value);
    to_queries(scale, second, key_, p_.key.row, p_.width, T(0), grad_query);
    to_keys(scale, second, q, p_.query.row, p_.width, grad_key);
    if (grad_grad_key_ != nullptr) {
      to_queries(scale, gradient, grad_grad_key_, p_.grad_grad_key.row, p_.width, T(1), grad_query);
    }
    if (a != nullptr) to_keys(scale, gradient, a, p_.grad_grad_query.row, p_.width, grad_key);
  }

  // moved: weights' derivatives; gradient: those of the moved scores; second: those of the scores.
  void combine(const T* weight, T* moved, T* gradient, T* second) const {
    T *const mean_moved = sums_[1], *const mean_gradient = sums_[2], *const mean = sums_[3];
    means<true>(moved, mean_moved);
    means<false>(gradient, mean_gradient);
    add_keys(mean, sums_[0], [=, n = size_](int64_t j, T* part) {
      const T* const w = weight + j * n;
      T *const m = moved + j * n, *const d = gradient + j * n, *const z = second + j * n;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const T step = m[i] - mean_moved[i], centred = d[i] - mean_gradient[i];
        const T weighted = w[i] * (step * centred + z[i]);
        part[i] += weighted;
        z[i] = weighted;
        m[i] = w[i] * step;
        d[i] = w[i] * centred;
      }
    });
    for (int64_t j = 0; j < keys_; ++j) {
      const T* const w = weight + j * size_;
      T* const z = second + j * size_;
#pragma omp simd
      for (int64_t i = 0; i < size_; ++i) z[i] -= w[i] * mean[i];
    }
  }

  static constexpr T kHidden = -std::numeric_limits<T>::infinity();

  const Attention& p_;
  const int64_t size_;
  const bool has_blas_;
  T *pairs_[4] = {}, *factors_ = nullptr, *columns_[3] = {}, *sums_[kSums] = {};
  int64_t batch_ = 0, head_ = 0, index_ = 0, key_index_ = 0, first_ = 0, count_ = 0, keys_ = 0;
  const T *key_ = nullptr, *value_ = nullptr, *grad_grad_key_ = nullptr, *grad_grad_value_ = nullptr;
};

template <class T>
void run(const Attention& p, int level, T* workspace, int threads) {
  const int64_t tasks = p.batch * p.key_heads, share = attention_workspace(p, level);
  if (tasks == 0 || p.queries == 0) return;
  const int64_t shares = std::min<int64_t>(threads, tasks);
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(shares)) if (shares > 1)
  for (int64_t s = 0; s < shares; ++s) {
    const OneBlasThread alone(threads > 1);
    Block<T> block(p, level, workspace + s * share);
    for (int64_t task = tasks * s / shares; task < tasks * (s + 1) / shares; ++task) {
      block.run(level, task / p.key_heads, task % p.key_heads);
    }
  }
}

}  // namespace

int64_t attention_workspace(const Attention& p, int level) {
  const int64_t pairs = (kBlocks[level] + (p.dropout ? 1 : 0)) * p.keys;
  const int64_t columns = kOperands[level] * std::max(p.width, p.value_width);
  const int64_t numbers = (pairs + columns + kSums) * block_of(p);
  return (numbers + kPadding - 1) / kPadding * kPadding;
}

void attention(const Attention& p, int level, void* workspace, int threads) {
  p.wide ? run(p, level, static_cast<double*>(workspace), threads)
         : run(p, level, static_cast<float*>(workspace), threads);
}

}  // namespace HVP_VARIANT
}  // namespace hvp
