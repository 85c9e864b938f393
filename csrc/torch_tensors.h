// How the bindings read tensors of torch.
#pragma once

#include <pybind11/pybind11.h>

#include "dtypes.h"
#include "tensors.h"

namespace hvp {

namespace py = pybind11;

// Access to torch's tensors, looked up once.
struct Torch {
  PyTypeObject* type;
  py::object is_neg, threads;
  const dlpack::ExchangeTable* table = nullptr;

  Torch() {
    const py::module_ torch = py::module_::import("torch");
    const py::object tensor = torch.attr("Tensor");
    type = reinterpret_cast<PyTypeObject*>(py::object(tensor).release().ptr());
    is_neg = tensor.attr("is_neg");
    threads = torch.attr("get_num_threads");
    const py::object capsule = py::getattr(tensor, dlpack::kAttribute, py::none());
    if (!capsule.is_none()) {
      auto* header =
          static_cast<dlpack::ExchangeHeader*>(PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
      if (header == nullptr) throw py::error_already_set();
      while (header != nullptr && header->major != dlpack::kMajor) header = header->previous;
      table = reinterpret_cast<const dlpack::ExchangeTable*>(header);
    }
    if (table == nullptr || table->view == nullptr) {
      throw py::import_error("torch.Tensor has no DLPack 1.x exchange table: install torch >= 2.11");
    }
  }

  static const Torch& get() {
    // Never destroyed, since Python objects must not outlive the interpreter.
    static const Torch* torch = new Torch();
    return *torch;
  }

  bool is_tensor(PyObject* object) const { return PyObject_TypeCheck(object, type); }

  // False, without an error, for what is no tensor with a view.
  bool try_view(PyObject* object, dlpack::Tensor* view) const {
    if (!is_tensor(object)) return false;
    if (table->view(object, view) == 0) return true;
    PyErr_Clear();
    return false;
  }

  dlpack::Tensor view(PyObject* tensor) const {
    dlpack::Tensor view;
    if (table->view(tensor, &view) != 0) throw py::error_already_set();
    return view;
  }

  // Whether the numbers are the negatives of what is in memory: a lazy view that some complex functions
  // return.
  bool negated(PyObject* tensor) const {
    const py::object result =
        py::reinterpret_steal<py::object>(PyObject_Vectorcall(is_neg.ptr(), &tensor, 1, nullptr));
    if (!result) throw py::error_already_set();
    return result.ptr() != Py_False;
  }
};

inline uintptr_t address(const dlpack::Tensor& view) {
  return reinterpret_cast<uintptr_t>(view.data) + view.byte_offset;
}

// The memory behind a tensor, or null for None.
inline void* memory(const py::object& tensor) {
  return tensor.is_none() ? nullptr : reinterpret_cast<void*>(address(Torch::get().view(tensor.ptr())));
}

inline int64_t numel(const dlpack::Tensor& view) {
  int64_t product = 1;
  for (int32_t d = 0; d < view.dimensions; ++d) product *= view.shape[d];
  return product;
}

#ifdef HVP_HAS_CUDA
// Calls `launch` with torch's current stream of a CUDA device, without the interpreter's lock; its
// std::runtime_error becomes a BackendError.
template <class Launch>
void on_current_stream(const dlpack::Device& device, const Launch& launch) {
  void* stream = nullptr;
  if (Torch::get().table->current_stream(device.type, device.index, &stream) != 0)
    throw py::error_already_set();
  try {
    const py::gil_scoped_release release;
    launch(stream);
  } catch (const std::runtime_error& error) {
    py::set_error(py::module_::import("hvp_engine.errors").attr("BackendError"), error.what());
    throw py::error_already_set();
  }
}
#endif

// The element type; kDTypes for one that no op takes.
inline int dtype_of(const dlpack::DataType& dtype) {
  if (dtype.code == dlpack::kBFloat && dtype.bits == 16) return static_cast<int>(DType::kBFloat16);
  if (dtype.code != dlpack::kFloat) return kDTypes;
  switch (dtype.bits) {
    case 16:
      return static_cast<int>(DType::kFloat16);
    case 32:
      return static_cast<int>(DType::kFloat32);
    case 64:
      return static_cast<int>(DType::kFloat64);
  }
  return kDTypes;
}

inline bool is_wide(const dlpack::Tensor& view) {
  return dtype_of(view.dtype) == static_cast<int>(DType::kFloat64);
}

// Threads for an elementwise pass: one is faster than waking others for few elements.
inline int threads_for(int64_t elements) {
  return elements < (int64_t{1} << 16) ? 1 : py::cast<int>(Torch::get().threads());
}

}  // namespace hvp
