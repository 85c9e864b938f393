// The recurrence of a GRU and its two derivatives.
#pragma once

#include "recurrent_run.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

template <class T>
class Gru : RecurrentRun<T> {
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

  // The product with the state goes to the last three of the four blocks of a row of gates.
  void value() {
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

  void backward() {
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

  void double_backward() {
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
};

}  // namespace
}  // namespace HVP_VARIANT
}  // namespace hvp
