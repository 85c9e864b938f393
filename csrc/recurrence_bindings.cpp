// A recurrence bound to its numbers.
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "recurrences.h"
#include "torch_tensors.h"
#ifdef HVP_HAS_CUDA
#include "cuda.h"
#endif

namespace hvp {
namespace {

RecurrenceCode recurrence_of(const std::string& name) {
  int code = 0;
  for (const RecurrenceTraits& traits : kRecurrences) {
    if (name == traits.name) return static_cast<RecurrenceCode>(code);
    ++code;
  }
  throw py::value_error("name: expected the name of a recurrence; got '" + name + "'");
}

class Recurrence {
 public:
  Recurrence(const std::string& name, py::object state)
      : code_(recurrence_of(name)), state_(std::move(state)) {
    const dlpack::Tensor view = Torch::get().view(state_.ptr());
    const RecurrenceTraits& traits = kRecurrences[static_cast<int>(code_)];
    if (dtype_of(view.dtype) != static_cast<int>(DType::kFloat64) || numel(view) != traits.numbers) {
      throw py::value_error(name + ": state: expected " + std::to_string(traits.numbers) +
                            " float64 numbers");
    }
    device_ = view.device;
    numbers_ = reinterpret_cast<double*>(address(view));
  }

  void operator()() const {
    if (device_.type == dlpack::kCuda) {
      run_on_cuda();
      return;
    }
    switch (code_) {
#define HVP_CASE(name, Struct) \
  case RecurrenceCode::name:   \
    Struct::run(numbers_);     \
    break;
      HVP_RECURRENCES(HVP_CASE)
#undef HVP_CASE
    }
  }

 private:
  void run_on_cuda() const {
#ifdef HVP_HAS_CUDA
    on_current_stream(device_,
                      [this](void* stream) { run_recurrence_cuda(code_, numbers_, device_.index, stream); });
#else
    throw std::runtime_error("the extension was built without CUDA");
#endif
  }

  RecurrenceCode code_;
  py::object state_;  // keeps the memory alive
  dlpack::Device device_{dlpack::kCpu, 0};
  double* numbers_;
};

}  // namespace

void bind_recurrence(py::module_& module) {
  py::class_<Recurrence>(module, "Recurrence", "A recurrence bound to its numbers; calling it advances them.")
      .def(py::init<const std::string&, py::object>(), py::arg("name"), py::arg("state"))
      .def("__call__", &Recurrence::operator());
}

}  // namespace hvp
