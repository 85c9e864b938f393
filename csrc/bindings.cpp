// The only file that knows Python: hvp_engine._C, an op bound to its state.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"
#ifdef HVP_HAS_CUDA
#include "cuda.h"
#endif

namespace py = pybind11;

namespace hvp {
namespace {

// Below this many elements one thread is faster than waking others.
constexpr int64_t kParallelElements = int64_t{1} << 20;
// Below this many elements the work is shorter than handing the interpreter's lock over.
constexpr int64_t kReleaseElements = int64_t{1} << 14;

// Methods of torch.Tensor, looked up once: calling them directly skips the attribute lookup on every product.
struct TensorApi {
  py::object type, numel, dtype_getter, is_contiguous, stride, data_ptr;
  PyObject* dtypes[kDTypes];

  TensorApi() {
    const py::module_ torch = py::module_::import("torch");
    type = torch.attr("Tensor");
    numel = type.attr("numel");
    is_contiguous = type.attr("is_contiguous");
    stride = type.attr("stride");
    data_ptr = type.attr("data_ptr");
    const char* names[kDTypes] = {"float32", "float64", "bfloat16", "float16"};
    for (int i = 0; i < kDTypes; ++i) dtypes[i] = py::object(torch.attr(names[i])).release().ptr();
  }

  static const TensorApi& get() {
    static const TensorApi* api = new TensorApi();  // never destroyed: it must not outlive the interpreter
    return *api;
  }
};

py::object call(const py::object& method, PyObject* tensor) {
  PyObject* result = PyObject_Vectorcall(method.ptr(), &tensor, 1, nullptr);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

uintptr_t address(PyObject* tensor) {
  const py::object result = call(TensorApi::get().data_ptr, tensor);
  return static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(result.ptr()));
}

DType dtype_of(const py::handle& dtype) {
  const TensorApi& api = TensorApi::get();
  for (int i = 0; i < kDTypes; ++i) {
    if (dtype.ptr() == api.dtypes[i]) return static_cast<DType>(i);
  }
  throw py::type_error("dtype: expected a floating dtype; got " + std::string(py::repr(dtype)));
}

OpCode op_of(const std::string& name) {
  for (int i = 0; i < kOpCount; ++i) {
    if (name == kOps[i].name) return static_cast<OpCode>(i);
  }
  throw py::value_error("op: expected one of hvp_engine.ops.OPS; got '" + name + "'");
}

// What a product must look like to be read as it is.
struct Expected {
  int64_t numel;
  DType dtype;
  py::object strides;  // a tuple, or None for a row-major tensor
};

class Plan {
 public:
  Plan(const std::string& op, int device, const std::vector<py::object>& states,
       const std::vector<int64_t>& numels, const std::vector<int64_t>& offsets,
       const std::vector<py::object>& strides, const std::vector<py::object>& dtypes,
       const py::object& state_dtype, const std::vector<py::object>& scalars, double damping,
       const py::object& partials, py::object conform, py::object resource)
      : device_(device), conform_(std::move(conform)), resource_(std::move(resource)) {
    code_ = op_of(op);
    const OpTraits& traits = kOps[static_cast<int>(code_)];
    if (static_cast<int>(states.size()) != traits.states ||
        static_cast<int>(scalars.size()) != traits.scalars || numels.size() != offsets.size() ||
        numels.size() != strides.size() || numels.size() != dtypes.size()) {
      throw py::value_error(op + ": wrong number of states, scalars or products");
    }
    state_dtype_ = dtype_of(state_dtype);
    damping_ = damping;
    for (const py::object& state : states) {
      states_.push_back(address(state.ptr()));
      size_.push_back(py::cast<int64_t>(call(TensorApi::get().numel, state.ptr())) * width());
    }
    for (const py::object& scalar : scalars) scalars_.push_back(address(scalar.ptr()));
    partials_ = address(partials.ptr());
    held_ = {py::cast(states), py::cast(scalars), partials};
    for (size_t i = 0; i < numels.size(); ++i) {
      parts_.push_back({numels[i], offsets[i], rows_});
      expected_.push_back({numels[i], dtype_of(dtypes[i]), strides[i]});
      rows_ += (numels[i] + kChunk - 1) / kChunk;
      elements_ += numels[i];
    }
  }

  void operator()(const py::object& products) const {
    const py::object sequence = py::reinterpret_steal<py::object>(
        PySequence_Fast(products.ptr(), "products: expected a list or tuple of tensors"));
    if (!sequence) throw py::error_already_set();
    const size_t count = static_cast<size_t>(PySequence_Fast_GET_SIZE(sequence.ptr()));
    if (count != parts_.size()) {
      throw py::value_error(std::string(kOps[static_cast<int>(code_)].name) + ": products: expected " +
                            std::to_string(parts_.size()) + " tensors; got " + std::to_string(count));
    }
    std::vector<py::object> copies;
    std::vector<Product> read(count);
    for (size_t i = 0; i < count; ++i) {
      PyObject* item = PySequence_Fast_GET_ITEM(sequence.ptr(), i);
      uintptr_t data;
      if (readable(i, item, &data)) {
        read[i] = {reinterpret_cast<const void*>(data), expected_[i].dtype};
      } else {
        copies.push_back(conform_(i, py::handle(item)));
        read[i] = {reinterpret_cast<const void*>(address(copies.back().ptr())), state_dtype_};
      }
    }
    run(read);
  }

 private:
  // Whether a product can be read in place: of the expected type, size and strides, and apart from the
  // states.
  bool readable(size_t index, PyObject* item, uintptr_t* data) const {
    const TensorApi& api = TensorApi::get();
    const Expected& expected = expected_[index];
    if (!PyObject_TypeCheck(item, reinterpret_cast<PyTypeObject*>(api.type.ptr()))) return false;
    if (PyLong_AsLongLong(call(api.numel, item).ptr()) != expected.numel) return false;
    const py::object dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(item, dtype_name().ptr()));
    if (!dtype) throw py::error_already_set();
    if (dtype.ptr() != api.dtypes[static_cast<int>(expected.dtype)]) return false;
    if (expected.numel != 1) {
      const bool same = expected.strides.is_none() ? call(api.is_contiguous, item).ptr() == Py_True
                                                   : call(api.stride, item).equal(expected.strides);
      if (!same) return false;
    }
    *data = address(item);
    return apart(index, *data);
  }

  // A product may be a state's own part (each element is read before it is written), but no other memory of
  // one.
  bool apart(size_t index, uintptr_t data) const {
    static constexpr uintptr_t kSizes[kDTypes] = {4, 8, 2, 2};
    const Expected& expected = expected_[index];
    const uintptr_t end =
        data + static_cast<uintptr_t>(expected.numel) * kSizes[static_cast<int>(expected.dtype)];
    for (size_t s = 0; s < states_.size(); ++s) {
      const bool overlap = data < states_[s] + size_[s] && states_[s] < end;
      const bool own = expected.dtype == state_dtype_ && data == states_[s] + parts_[index].offset * width();
      if (overlap && !own) return false;
    }
    return true;
  }

  void run(const std::vector<Product>& products) const {
    Step step{code_,    state_dtype_ == DType::kFloat64,      {},     {},
              damping_, reinterpret_cast<double*>(partials_), parts_, products,
              rows_};
    for (size_t i = 0; i < states_.size(); ++i) step.states[i] = reinterpret_cast<void*>(states_[i]);
    for (size_t i = 0; i < scalars_.size(); ++i)
      step.scalars[i] = reinterpret_cast<const double*>(scalars_[i]);
    if (device_ < 0) {
      const int threads = elements_ < kParallelElements ? 1 : py::cast<int>(resource_());
      if (elements_ < kReleaseElements) {
        run_cpu(step, threads);
      } else {
        const py::gil_scoped_release release;
        run_cpu(step, threads);
      }
      return;
    }
#ifdef HVP_HAS_CUDA
    const uintptr_t stream = py::cast<uintptr_t>(resource_());
    const py::gil_scoped_release release;
    run_cuda(step, device_, stream);
#else
    throw std::runtime_error("the extension was built without CUDA");
#endif
  }

  uintptr_t width() const { return state_dtype_ == DType::kFloat64 ? 8 : 4; }

  static const py::object& dtype_name() {
    static const py::object* name =
        new py::object(py::reinterpret_steal<py::object>(PyUnicode_InternFromString("dtype")));
    return *name;
  }

  OpCode code_;
  int device_;  // index of a CUDA device; negative for the CPU
  DType state_dtype_;
  double damping_;
  std::vector<uintptr_t> states_, scalars_;
  std::vector<uintptr_t> size_;  // of each state in bytes
  uintptr_t partials_;
  std::vector<Part> parts_;
  std::vector<Expected> expected_;
  int64_t rows_ = 0, elements_ = 0;
  std::vector<py::object> held_;  // keeps the memory behind the addresses alive
  py::object conform_, resource_;
};

}  // namespace
}  // namespace hvp

PYBIND11_MODULE(_C, module) {
  module.doc() = "Fused vector ops in C++ and CUDA; hvp_engine.native is the way in.";
#ifdef HVP_HAS_CUDA
  module.attr("has_cuda") = true;
  module.def("cuda_problem", &hvp::cuda_problem, "Why CUDA cannot be used on this machine; empty if it can.");
#else
  module.attr("has_cuda") = false;
  module.def("cuda_problem", [] { return std::string("the extension was built without CUDA"); });
#endif
  module.def("cpu_variant", &hvp::cpu_variant, "The instruction set of the CPU kernels in use.");
  py::class_<hvp::Plan>(module, "Plan", "An op bound to its state; calling it with the products runs it.")
      .def(py::init<const std::string&, int, const std::vector<py::object>&, const std::vector<int64_t>&,
                    const std::vector<int64_t>&, const std::vector<py::object>&,
                    const std::vector<py::object>&, const py::object&, const std::vector<py::object>&, double,
                    const py::object&, py::object, py::object>(),
           py::arg("op"), py::arg("device"), py::arg("states"), py::arg("numels"), py::arg("offsets"),
           py::arg("strides"), py::arg("dtypes"), py::arg("state_dtype"), py::arg("scalars"),
           py::arg("damping"), py::arg("partials"), py::arg("conform"), py::arg("resource"))
      .def("__call__", &hvp::Plan::operator(), py::arg("products"));
}
