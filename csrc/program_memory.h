// Where the operations of a program find what they read and write, for the kernels of each instruction set.
#pragma once

#include <cstdint>

#include "program.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

template <class T>
struct ProgramMemory {
  const Program& program;
  void* const* slots;
  const double* row;

  T* at(const Place& place) const { return static_cast<T*>(slots[place.slot]) + place.offset; }
  double constant(int64_t index) const { return index >= 0 ? row[index] : program.constants[-1 - index]; }
};

}  // namespace
}  // namespace HVP_VARIANT
}  // namespace hvp
