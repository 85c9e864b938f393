// The recurrence of an LSTM and its two derivatives.
#pragma once

#include "recurrent_run.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

template <class T>
class Lstm : RecurrentRun<T> {
  using Base = RecurrentRun<T>;
  using Base::add_product;
  using Base::copy;
  using Base::each_time;
  using Base::h_;
  using Base::rows;
  using Base::state;
  using Base::tensors_;

 public:
  using Base::Base;

  void value() {
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

  void backward() {
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

  void double_backward() {
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
};

}  // namespace
}  // namespace HVP_VARIANT
}  // namespace hvp
