// Recurrences on tensors of torch, for hvp_engine.differentiable.recurrent.native.
#include <pybind11/stl.h>

#include <string>

#include "bindings.h"
#include "blas.h"
#include "recurrent.h"
#include "torch_tensors.h"
#include "variants.h"

namespace hvp {
namespace {

// Tensors in the order of `recurrence_tensors`, contiguous and of one type; None for one that is missing.
void recurrence(int64_t code, int64_t units, const std::vector<int64_t>& batch_sizes, bool reverse,
                const py::sequence& tensors) {
  if (code < 0 || code >= static_cast<int64_t>(RecurrentCode::kCount)) throw py::value_error("code");
  if (units < 0 || !packed(batch_sizes)) throw py::value_error("batch_sizes");
  if (!blas().problem.empty()) throw py::value_error("recurrence: " + blas().problem);
  const Torch& torch = Torch::get();
  RecurrentLayer one{static_cast<RecurrentCode>(code), false, reverse, units, batch_sizes};
  const std::vector<RecurrentTensor>& table = recurrence_tensors(one.code);
  if (tensors.size() != table.size())
    throw py::value_error("tensors: expected " + std::to_string(table.size()));
  std::vector<void*> memory;
  int dtype = kDTypes;
  for (size_t i = 0; i < table.size(); ++i) {
    const py::object tensor = tensors[i];
    const std::string name = "tensors[" + std::to_string(i) + "]";
    if (tensor.is_none()) {
      if (!table[i].optional) throw py::value_error(name + ": expected a tensor");
      memory.push_back(nullptr);
      continue;
    }
    if (!torch.is_tensor(tensor.ptr())) throw py::type_error(name + ": expected a tensor");
    const dlpack::Tensor view = torch.view(tensor.ptr());
    if (dtype == kDTypes) dtype = dtype_of(view.dtype);
    bool fits = view.device.type == dlpack::kCpu && dtype_of(view.dtype) == dtype &&
                !torch.negated(tensor.ptr()) &&
                numel(view) == one.rows_of(table[i]) * one.columns_of(table[i]);
    int64_t stride = 1;
    for (int32_t d = view.dimensions - 1; d >= 0; --d) {
      fits &= view.shape[d] == 1 || view.strides[d] == stride || numel(view) == 0;
      stride *= view.shape[d];
    }
    if (!fits) throw py::value_error(name + ": another shape, type, device or layout than expected");
    memory.push_back(reinterpret_cast<void*>(address(view)));
  }
  one.wide = dtype == static_cast<int>(DType::kFloat64);
  if (!one.wide && dtype != static_cast<int>(DType::kFloat32))
    throw py::type_error("tensors: expected floats");
  const int threads = py::cast<int>(torch.threads());
  const py::gil_scoped_release release;
  variant().run_recurrence(one, memory.data(), threads);
}

}  // namespace

void bind_recurrent(py::module_& module) {
  module.def("recurrence", &recurrence, "A recurrence of an LSTM or GRU, or one of its derivatives.",
             py::kw_only(), py::arg("code"), py::arg("units"), py::arg("batch_sizes"), py::arg("reverse"),
             py::arg("tensors"));
}

}  // namespace hvp
