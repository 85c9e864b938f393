// The value of attention and its two derivatives on a CPU, compiled for each instruction set. A block of
// queries meets all keys at once, so that each row of weights is whole when its sums are needed.
#include "attention_pairs.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

template <class T>
class Block : AttentionPairs<T> {
  using Pairs = AttentionPairs<T>;
  using Pairs::add_keys;
  using Pairs::batch_;
  using Pairs::count_;
  using Pairs::draw;
  using Pairs::drop;
  using Pairs::exponentials;
  using Pairs::first_;
  using Pairs::grad_grad_key_;
  using Pairs::grad_grad_value_;
  using Pairs::head_;
  using Pairs::index_;
  using Pairs::key_;
  using Pairs::key_index_;
  using Pairs::key_result;
  using Pairs::keys_;
  using Pairs::kHidden;
  using Pairs::p_;
  using Pairs::pairs_;
  using Pairs::queries;
  using Pairs::result;
  using Pairs::rows;
  using Pairs::scores;
  using Pairs::size_;
  using Pairs::sums_;
  using Pairs::to_keys;
  using Pairs::to_pairs;
  using Pairs::to_queries;
  using Pairs::transposed;
  using Pairs::unscaled_weights;
  using Pairs::value_;

 public:
  using Pairs::Pairs;

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
    Pairs::template means<true>(gradient, mean);
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
    Pairs::template means<true>(moved, mean_moved);
    Pairs::template means<false>(gradient, mean_gradient);
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
