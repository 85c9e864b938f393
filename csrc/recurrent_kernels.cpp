// The recurrences, compiled for each instruction set.
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
class Run {
 public:
  Run(const RecurrentLayer& recurrence, void* const* tensors, int threads)
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

  void run() {
    switch (r_.code) {
      case RecurrentCode::kLstm:
        return lstm();
      case RecurrentCode::kLstmBackward:
        return lstm_backward();
      case RecurrentCode::kLstmDoubleBackward:
        return lstm_double_backward();
      case RecurrentCode::kGru:
        return gru();
      case RecurrentCode::kGruBackward:
        return gru_backward();
      case RecurrentCode::kGruDoubleBackward:
        return gru_double_backward();
      case RecurrentCode::kCount:
        return;
    }
  }

 private:
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

  void lstm() {
    const int64_t h = h_;
    const Rows<T> projected = rows(0), output = rows(4), previous = rows(7), gates = rows(8),
                  previous_cell = rows(9), squashed = rows(10);
    const T* const weight = rows(1).data;
    T *const hidden = state(5, 2), *const cell = state(6, 3);
    each_time(false, [&](int64_t row, int64_t sequence, int64_t count) {
      T *const states = hidden + sequence * h, *const cells = cell + sequence * h;
      copy(projected.at(row), gates.at(row), count * 4 * h);
      copy(states, previous.at(row), count * h);
      copy(cells, previous_cell.at(row), count * h);
      add_product(states, h, weight, 4 * h, gates.at(row), 4 * h, count);
      for (int64_t k = 0; k < count; ++k) {
        T *const gate = gates.at(row + k), *const out = output.at(row + k), *const s = squashed.at(row + k);
        T *const c = cells + k * h, *const state = states + k * h;
#pragma omp simd
        for (int64_t j = 0; j < h; ++j) {
          const T i = sigmoid(gate[j]), f = sigmoid(gate[h + j]), g = hyperbolic_tangent(gate[2 * h + j]);
          const T o = sigmoid(gate[3 * h + j]);
          gate[j] = i;
          gate[h + j] = f;
          gate[2 * h + j] = g;
          gate[3 * h + j] = o;
          c[j] = f * c[j] + i * g;
          s[j] = hyperbolic_tangent(c[j]);
          state[j] = o * s[j];
          out[j] = state[j];
        }
      }
    });
  }

  void lstm_backward() {
    const int64_t h = h_;
    const Rows<T> of_output = rows(0), of_previous = rows(3), of_gates = rows(4), of_cell = rows(5),
                  of_squashed = rows(6), gates = rows(8), previous_cell = rows(9), squashed = rows(10);
    const T* const weight = rows(7).data;
    const Rows<T> projected = rows(11);
    const bool keep = tensors_[14] != nullptr;
    const Rows<T> hidden_grads = rows(14), cell_grads = rows(15);
    T *const hidden = state(12, 1), *const cell = state(13, 2);
    each_time(true, [&](int64_t row, int64_t sequence, int64_t count) {
      T* const states = hidden + sequence * h;
      for (int64_t k = 0; k < count; ++k) {
        const T *const gate = gates.at(row + k), *const before = previous_cell.at(row + k);
        const T *const s = squashed.at(row + k), *const e = of_gates.at(row + k),
                       *const eo = of_output.at(row + k);
        const T *const ec = of_cell.at(row + k), *const es = of_squashed.at(row + k);
        T *const to = projected.at(row + k), *const state = states + k * h;
        T* const c = cell + (sequence + k) * h;
        const auto at = [&](int64_t j, T* dh, T* dc) __attribute__((always_inline)) {
          const T i = gate[j], f = gate[h + j], g = gate[2 * h + j], o = gate[3 * h + j];
          *dh = state[j] + eo[j];
          *dc = c[j] + (*dh * o + es[j]) * (T(1) - s[j] * s[j]);
          to[j] = (*dc * g + e[j]) * i * (T(1) - i);
          to[h + j] = (*dc * before[j] + e[h + j]) * f * (T(1) - f);
          to[2 * h + j] = (*dc * i + e[2 * h + j]) * (T(1) - g * g);
          to[3 * h + j] = (*dh * s[j] + e[3 * h + j]) * o * (T(1) - o);
          c[j] = *dc * f + ec[j];
        };
        if (keep) {
          T *const dh = hidden_grads.at(row + k), *const dc = cell_grads.at(row + k);
#pragma omp simd
          for (int64_t j = 0; j < h; ++j) at(j, dh + j, dc + j);
        } else {
          T dh, dc;
#pragma omp simd private(dh, dc)
          for (int64_t j = 0; j < h; ++j) at(j, &dh, &dc);
        }
        copy(of_previous.at(row + k), state, h);
      }
      add_product(projected.at(row), 4 * h, weight, h, states, h, count);
    });
  }

  void lstm_double_backward() {
    const int64_t h = h_;
    const Rows<T> cotangent = rows(0), gates = rows(4), previous_cell = rows(5), squashed = rows(6),
                  hidden_grads = rows(7), cell_grads = rows(8);
    const T* const weight = rows(3).data;
    const Rows<T> output = rows(9), previous = rows(12), sources = rows(13), cell_sources = rows(14),
                  squashed_sources = rows(15);
    T *const hidden = state(10, 1), *const cell = state(11, 2);
    each_time(false, [&](int64_t row, int64_t sequence, int64_t count) {
      T* const states = hidden + sequence * h;
      copy(cotangent.at(row), sources.at(row), count * 4 * h);
      copy(states, previous.at(row), count * h);
      add_product(states, h, weight, 4 * h, sources.at(row), 4 * h, count);
      for (int64_t k = 0; k < count; ++k) {
        const T *const gate = gates.at(row + k), *const before = previous_cell.at(row + k);
        const T *const s = squashed.at(row + k), *const dhs = hidden_grads.at(row + k);
        const T* const dcs = cell_grads.at(row + k);
        T *const a = sources.at(row + k), *const of_cell = cell_sources.at(row + k);
        T *const of_squashed = squashed_sources.at(row + k), *const out = output.at(row + k);
        T *const c = cell + (sequence + k) * h, *const state = states + k * h;
#pragma omp simd
        for (int64_t j = 0; j < h; ++j) {
          const T i = gate[j], f = gate[h + j], g = gate[2 * h + j], o = gate[3 * h + j];
          const T ai = a[j], af = a[h + j], ag = a[2 * h + j], ao = a[3 * h + j];
          const T ui = ai * i * (T(1) - i), uf = af * f * (T(1) - f), ug = ag * (T(1) - g * g);
          const T uo = ao * o * (T(1) - o), dh = dhs[j], dc = dcs[j], old = c[j];
          const T now = ui * g + uf * before[j] + ug * i + old * f, u = now * (T(1) - s[j] * s[j]);
          c[j] = now;
          state[j] = uo * s[j] + u * o;
          out[j] = state[j];
          a[j] = dc * (ai * g * (T(1) - T(2) * i) + ug);
          a[h + j] = dc * (af * before[j] * (T(1) - T(2) * f) + old);
          a[2 * h + j] = dc * (ui - T(2) * ag * i * g);
          a[3 * h + j] = dh * (ao * s[j] * (T(1) - T(2) * o) + u);
          of_cell[j] = uf * dc;
          of_squashed[j] = dh * (uo - T(2) * now * o * s[j]);
        }
      }
    });
  }

  // The product with the state goes to the last three of the four blocks of a row of gates.
  void gru() {
    const int64_t h = h_;
    const Rows<T> projected = rows(0), output = rows(4), previous = rows(6), gates = rows(7);
    const T *const weight = rows(1).data, *const bias = rows(2).data;
    T* const hidden = state(5, 3);
    each_time(false, [&](int64_t row, int64_t sequence, int64_t count) {
      T* const states = hidden + sequence * h;
      copy(states, previous.at(row), count * h);
      for (int64_t k = 0; k < count; ++k) copy(bias, gates.at(row + k) + h, 3 * h);
      add_product(states, h, weight, 3 * h, gates.at(row) + h, 4 * h, count);
      for (int64_t k = 0; k < count; ++k) {
        const T* const p = projected.at(row + k);
        T *const gate = gates.at(row + k), *const out = output.at(row + k), *const state = states + k * h;
#pragma omp simd
        for (int64_t j = 0; j < h; ++j) {
          const T r = sigmoid(p[j] + gate[h + j]), z = sigmoid(p[h + j] + gate[2 * h + j]);
          const T n = hyperbolic_tangent(p[2 * h + j] + r * gate[3 * h + j]);
          gate[j] = r;
          gate[h + j] = z;
          gate[2 * h + j] = n;
          state[j] = n + z * (state[j] - n);
          out[j] = state[j];
        }
      }
    });
  }

  void gru_backward() {
    const int64_t h = h_;
    const Rows<T> of_output = rows(0), of_previous = rows(2), of_gates = rows(3), previous = rows(5),
                  gates = rows(6);
    const T* const weight = rows(4).data;
    const Rows<T> projected = rows(7), recurrent = rows(8), hidden_grads = rows(10);
    const bool keep = tensors_[10] != nullptr;
    T* const hidden = state(9, 1);
    each_time(true, [&](int64_t row, int64_t sequence, int64_t count) {
      T* const states = hidden + sequence * h;
      for (int64_t k = 0; k < count; ++k) {
        const T *const gate = gates.at(row + k), *const before = previous.at(row + k);
        const T *const e = of_gates.at(row + k), *const eo = of_output.at(row + k),
                       *const ep = of_previous.at(row + k);
        T *const p = projected.at(row + k), *const q = recurrent.at(row + k), *const state = states + k * h;
#pragma omp simd
        for (int64_t j = 0; j < h; ++j) state[j] += eo[j];
        if (keep) copy(state, hidden_grads.at(row + k), h);
#pragma omp simd
        for (int64_t j = 0; j < h; ++j) {
          const T r = gate[j], z = gate[h + j], n = gate[2 * h + j], m = gate[3 * h + j], dh = state[j];
          const T dn = (dh * (T(1) - z) + e[2 * h + j]) * (T(1) - n * n);
          const T dz = (dh * (before[j] - n) + e[h + j]) * z * (T(1) - z);
          const T dr = (dn * m + e[j]) * r * (T(1) - r);
          p[j] = dr;
          p[h + j] = dz;
          p[2 * h + j] = dn;
          q[j] = dr;
          q[h + j] = dz;
          q[2 * h + j] = dn * r + e[3 * h + j];
          state[j] = dh * z + ep[j];
        }
      }
      add_product(recurrent.at(row), 3 * h, weight, h, states, h, count);
    });
  }

  void gru_double_backward() {
    const int64_t h = h_;
    const Rows<T> of_projected = rows(0), of_recurrent = rows(1), previous = rows(4), gates = rows(5),
                  projected = rows(6), hidden_grads = rows(7);
    const T* const weight = rows(3).data;
    const Rows<T> output = rows(8), before = rows(10), previous_sources = rows(11), sources = rows(12);
    T* const hidden = state(9, 2);
    each_time(false, [&](int64_t row, int64_t sequence, int64_t count) {
      T* const states = hidden + sequence * h;
      copy(states, before.at(row), count * h);
      for (int64_t k = 0; k < count; ++k) copy(of_recurrent.at(row + k), sources.at(row + k) + h, 3 * h);
      add_product(states, h, weight, 3 * h, sources.at(row) + h, 4 * h, count);
      for (int64_t k = 0; k < count; ++k) {
        const T *const gate = gates.at(row + k), *const last = previous.at(row + k),
                       *const p = of_projected.at(row + k);
        const T *const dns = projected.at(row + k) + 2 * h, *const dhs = hidden_grads.at(row + k);
        T *const a = sources.at(row + k), *const of_previous = previous_sources.at(row + k);
        T *const out = output.at(row + k), *const state = states + k * h;
#pragma omp simd
        for (int64_t j = 0; j < h; ++j) {
          const T r = gate[j], z = gate[h + j], n = gate[2 * h + j], m = gate[3 * h + j];
          const T dn = dns[j], dh = dhs[j], change = last[j] - n, old = state[j];
          const T ar = a[h + j] + p[j], az = a[2 * h + j] + p[h + j], am = a[3 * h + j];
          const T ur = ar * r * (T(1) - r), uz = az * z * (T(1) - z), un = p[2 * h + j] + am * r + ur * m;
          const T u = un * (T(1) - n * n);
          state[j] = u * (T(1) - z) + uz * change + old * z;
          out[j] = state[j];
          of_previous[j] = uz * dh;
          a[j] = dn * (am + ar * m * (T(1) - T(2) * r));
          a[h + j] = dh * (az * change * (T(1) - T(2) * z) + old - u);
          a[2 * h + j] = -dh * (T(2) * un * n * (T(1) - z) + uz);
          a[3 * h + j] = dn * ur;
        }
      }
    });
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

void run_recurrence(const RecurrentLayer& recurrence, void* const* tensors, int threads) {
  if (recurrence.units == 0) return;
  if (recurrence.wide) {
    Run<double>(recurrence, tensors, threads).run();
  } else {
    Run<float>(recurrence, tensors, threads).run();
  }
}

}  // namespace HVP_VARIANT
}  // namespace hvp
