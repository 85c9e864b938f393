// Programs and the tensors they run on, for hvp_engine.differentiation.native.
#include <pybind11/stl.h>

#include <chrono>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "blas.h"
#include "program.h"
#include "torch_tensors.h"
#include "variants.h"

namespace hvp {
namespace {

// Seconds after which a run asks whether it was interrupted.
constexpr double kPatience = 0.1;

// What the tensor in a slot must look like.
struct Expected {
  Element element;
  std::vector<int64_t> shape, strides;

  int64_t numel() const {  // from the first element to the last
    int64_t last = 0;
    for (size_t d = 0; d < shape.size(); ++d) {
      if (shape[d] == 0) return 0;
      last += (shape[d] - 1) * strides[d];
    }
    return last + 1;
  }
};

// The slots that programs share.
struct Slots {
  bool wide;
  std::vector<Expected> expected;

  Slots(bool wide_, const std::vector<std::tuple<int, std::vector<int64_t>, std::vector<int64_t>>>& slots)
      : wide(wide_) {
    for (const auto& [element, shape, strides] : slots) {
      if (element < 0 || element > static_cast<int>(Element::kOther))
        throw py::value_error("slots: unknown kind");
      if (shape.size() != strides.size()) throw py::value_error("slots: expected as many strides as extents");
      for (size_t d = 0; d < shape.size(); ++d) {
        if (shape[d] < 0 || strides[d] < 0) throw py::value_error("slots: expected no negative numbers");
      }
      expected.push_back({static_cast<Element>(element), shape, strides});
    }
  }

  std::vector<SlotSpec> specs() const {
    std::vector<SlotSpec> specs;
    for (const Expected& one : expected) specs.push_back({one.element, one.numel()});
    return specs;
  }
};

// Which tensor is in each slot.
class Memory {
 public:
  explicit Memory(std::shared_ptr<const Slots> slots)
      : slots_(std::move(slots)), tensors_(slots_->expected.size()) {}

  // Puts `tensors` into the slots from `first` on; returns the first one that is not laid out as it must be,
  // or none: -1.
  int64_t put(int64_t first, const py::sequence& tensors) {
    const size_t count = tensors.size();
    if (first < 0 || static_cast<size_t>(first) + count > tensors_.size()) throw py::index_error("first");
    for (size_t i = 0; i < count; ++i) {
      py::object tensor = tensors[i];
      const size_t slot = static_cast<size_t>(first) + i;
      uintptr_t unused = 0;
      const bool read_here = slots_->expected[slot].element != Element::kOther;
      if (read_here && (!read(tensor.ptr(), slot, &unused) || Torch::get().negated(tensor.ptr()))) {
        return static_cast<int64_t>(i);
      }
      tensors_[slot] = std::move(tensor);
    }
    return -1;
  }

  void clear(int64_t first, int64_t count) {
    for (int64_t slot = first; slot < first + count; ++slot)
      tensors_.at(static_cast<size_t>(slot)) = py::object();
  }

  // Where the tensors are now: their storage may have been replaced or freed since they were put.
  std::vector<void*> addresses(const Program& program) const {
    std::vector<void*> found(tensors_.size(), nullptr);
    for (size_t slot = 0; slot < tensors_.size(); ++slot) {
      if (!program.used[slot]) continue;
      uintptr_t pointer = 0;
      if (!tensors_[slot] || !read(tensors_[slot].ptr(), slot, &pointer)) {
        throw py::value_error("memory: the tensor in slot " + std::to_string(slot) +
                              " is missing or has changed since it was put there");
      }
      if (pointer == 0 && slots_->expected[slot].numel() > 0) {
        throw py::value_error("memory: the storage of the tensor in slot " + std::to_string(slot) +
                              " has been freed since it was put there");
      }
      found[slot] = reinterpret_cast<void*>(pointer);
    }
    return found;
  }

  const std::shared_ptr<const Slots>& slots() const { return slots_; }

 private:
  bool read(PyObject* tensor, size_t slot, uintptr_t* pointer) const {
    const Expected& expected = slots_->expected[slot];
    dlpack::Tensor view;
    if (!Torch::get().try_view(tensor, &view)) return false;
    const bool fits =
        expected.element == Element::kIndex
            ? view.dtype.code == dlpack::kInt && view.dtype.bits == 64
            : dtype_of(view.dtype) == static_cast<int>(slots_->wide ? DType::kFloat64 : DType::kFloat32);
    if (!fits || view.device.type != dlpack::kCpu ||
        view.dimensions != static_cast<int32_t>(expected.shape.size())) {
      return false;
    }
    bool empty = false, in_order = true;
    for (int32_t d = 0; d < view.dimensions; ++d) {
      if (view.shape[d] != expected.shape[d]) return false;
      empty |= view.shape[d] == 0;
      in_order &= view.shape[d] == 1 || view.strides[d] == expected.strides[d];
    }
    *pointer = address(view);
    return in_order || empty;
  }

  std::shared_ptr<const Slots> slots_;
  std::vector<py::object> tensors_;
};

class NativeProgram {
 public:
  NativeProgram(std::shared_ptr<const Slots> slots, int64_t parameters, std::vector<double> constants,
                const std::vector<int64_t>& words)
      : slots_(std::move(slots)),
        program_(Program::parse(slots_->wide, parameters, slots_->specs(), std::move(constants), words)) {
    if (!program_.products.empty() && !blas().problem.empty())
      throw py::value_error("program: " + blas().problem);
  }

  // Once for each row of the table. The caller sees to it that nobody else uses the memory meanwhile.
  void run(Memory& memory, const std::vector<std::vector<double>>& table) const {
    if (memory.slots() != slots_)
      throw py::value_error("memory: expected one of the slots that the program has");
    const std::vector<void*> slots = memory.addresses(program_);
    for (const std::vector<double>& row : table) {
      if (static_cast<int64_t>(row.size()) != program_.parameters) {
        throw py::value_error("table: expected " + std::to_string(program_.parameters) +
                              " numbers in each row; got " + std::to_string(row.size()));
      }
    }
    const int threads = py::cast<int>(Torch::get().threads());
    bool in_range = true;
    {
      const py::gil_scoped_release release;
      auto asked = std::chrono::steady_clock::now();
      for (const std::vector<double>& row : table) {
        in_range &= variant().run_program(program_, slots.data(), row.data(), threads);
        const auto now = std::chrono::steady_clock::now();
        if (std::chrono::duration<double>(now - asked).count() < kPatience) continue;
        asked = now;
        const py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      }
    }
    if (!in_range) throw py::index_error("an index is out of the range of what it chooses from");
  }

  size_t steps() const { return program_.steps.size(); }

 private:
  std::shared_ptr<const Slots> slots_;
  Program program_;
};

}  // namespace

void bind_program(py::module_& module) {
  module.def("find_blas", &find_blas, py::arg("library"),
             "Look for BLAS in a library that is loaded, and in what it links.");
  module.def("blas_problem", [] { return blas().problem; }, "Why BLAS cannot be called; empty if it can.");
  py::class_<Slots, std::shared_ptr<Slots>>(module, "Slots", "What the tensors of programs look like.")
      .def(py::init<bool, const std::vector<std::tuple<int, std::vector<int64_t>, std::vector<int64_t>>>&>(),
           py::arg("wide"), py::arg("slots"));
  py::class_<Memory>(module, "Memory", "The tensors that programs run on, one for each slot.")
      .def(py::init([](const std::shared_ptr<Slots>& slots) { return new Memory(slots); }), py::arg("slots"))
      .def("put", &Memory::put, py::arg("first"), py::arg("tensors"))
      .def("clear", &Memory::clear, py::arg("first"), py::arg("count"));
  py::class_<NativeProgram>(module, "Program", "Operations on the tensors of a memory.")
      .def(py::init([](const std::shared_ptr<Slots>& slots, int64_t parameters, std::vector<double> constants,
                       const std::vector<int64_t>& words) {
             return new NativeProgram(slots, parameters, std::move(constants), words);
           }),
           py::arg("slots"), py::arg("parameters"), py::arg("constants"), py::arg("words"))
      .def("run", &NativeProgram::run, py::arg("memory"), py::arg("table"))
      .def_property_readonly("steps", &NativeProgram::steps);
}

}  // namespace hvp
