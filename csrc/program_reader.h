// Reads the words of a program one after another, and checks what they say.
#pragma once

#include <limits>
#include <string>

#include "program.h"

namespace hvp {

[[noreturn]] inline void fail(const std::string& what) { throw ProgramError("program: " + what); }

class ProgramReader {
 public:
  ProgramReader(Program& program, const std::vector<int64_t>& words) : program_(program), words_(words) {}

  bool more() const { return next_ < words_.size(); }

  int64_t word() {
    if (next_ >= words_.size()) fail("ends in the middle of an operation");
    return words_[next_++];
  }

  int64_t word(int64_t least, int64_t most, const char* name) {
    const int64_t value = word();
    if (value < least || value > most) {
      fail(std::string(name) + ": expected a number from " + std::to_string(least) + " to " +
           std::to_string(most) + "; got " + std::to_string(value));
    }
    return value;
  }

  int64_t extents() { return word(0, kMaxExtents, "extents"); }

  int64_t size() { return word(0, kLargest, "size"); }

  template <size_t N>
  void sizes(std::array<int64_t, N>& sizes, int64_t count) {
    for (int64_t d = 0; d < count; ++d) sizes[d] = size();
  }

  // A place of `count` elements along each extent, all of which must be inside its slot.
  template <size_t N>
  Place place(const std::array<int64_t, N>& sizes, int64_t count, Element element = Element::kNumber) {
    Place place;
    place.slot = word(0, static_cast<int64_t>(program_.slots.size()) - 1, "slot");
    place.offset = word(0, kLargest, "offset");
    const SlotSpec& slot = program_.slots[place.slot];
    if (slot.element != element) fail("slot " + std::to_string(place.slot) + " has another type of element");
    int64_t last = place.offset;
    bool empty = false;
    for (int64_t d = 0; d < count; ++d) {
      place.strides[d] = word(0, kLargest, "stride");
      empty |= sizes[d] == 0;
      if (sizes[d] > 1) last += (sizes[d] - 1) * place.strides[d];
      if (last > kLargest) fail("a place is too large");
    }
    if (!empty && last >= slot.numel) {
      fail("slot " + std::to_string(place.slot) + " has " + std::to_string(slot.numel) +
           " elements; element " + std::to_string(last) + " is asked for");
    }
    program_.used[place.slot] = true;
    return place;
  }

  // A matrix, row after row, all of which must be inside its slot.
  Place dense(const std::array<int64_t, 2>& sizes) {
    Place place;
    place.slot = word(0, static_cast<int64_t>(program_.slots.size()) - 1, "slot");
    place.offset = word(0, kLargest, "offset");
    const SlotSpec& slot = program_.slots[place.slot];
    if (slot.element != Element::kNumber)
      fail("slot " + std::to_string(place.slot) + " has another type of element");
    if (sizes[1] > 0 && sizes[0] > (slot.numel - place.offset) / sizes[1]) {
      fail("slot " + std::to_string(place.slot) + " is too small for a matrix in it");
    }
    program_.used[place.slot] = true;
    return place;
  }

  int64_t constant() {
    return word(-static_cast<int64_t>(program_.constants.size()), program_.parameters - 1, "constant");
  }

 private:
  static constexpr int64_t kLargest = std::numeric_limits<int32_t>::max() * int64_t{1024};
  Program& program_;
  const std::vector<int64_t>& words_;
  size_t next_ = 0;
};

}  // namespace hvp
