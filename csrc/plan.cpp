// A plan: an op bound to its state, so that a call only has to look at the products.
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "cpu.h"
#include "torch_tensors.h"
#ifdef HVP_HAS_CUDA
#include "cuda.h"
#endif

namespace hvp {
namespace {

// Below this many elements one thread is faster than waking others.
constexpr int64_t kParallelElements = int64_t{1} << 18;
// Below this many elements releasing the interpreter's lock costs more than the work.
constexpr int64_t kReleaseElements = int64_t{1} << 14;

OpCode op_of(const std::string& name) {
  for (int i = 0; i < kOpCount; ++i) {
    if (name == kOps[i].name) return static_cast<OpCode>(i);
  }
  throw py::value_error("op: expected the name of an op; got '" + name + "'");
}

// What a product must look like to be read where it is; `order` lists its dimensions as the state stores
// them.
struct Expected {
  DType dtype;
  std::vector<int64_t> shape, strides, order;
};

class Plan {
 public:
  Plan(const std::string& op, const std::vector<py::object>& states,
       const std::vector<std::vector<int64_t>>& shapes, const std::vector<std::vector<int64_t>>& strides,
       const std::vector<std::vector<int64_t>>& orders, const std::vector<py::object>& examples,
       const std::vector<int64_t>& offsets, const std::vector<py::object>& scalars, double damping,
       const py::object& partials, const py::object& slices, py::object conform)
      : code_(op_of(op)), damping_(damping), conform_(std::move(conform)) {
    const Torch& torch = Torch::get();
    const OpTraits& traits = kOps[static_cast<int>(code_)];
    const size_t count = shapes.size();
    if (static_cast<int>(states.size()) != traits.states ||
        static_cast<int>(scalars.size()) != traits.scalars || strides.size() != count ||
        orders.size() != count || examples.size() != count || offsets.size() != count) {
      throw py::value_error(op + ": wrong number of states, scalars or products");
    }
    for (const py::object& state : states) {
      const dlpack::Tensor view = torch.view(state.ptr());
      state_dtype_ = static_cast<DType>(dtype_of(view.dtype));
      device_ = view.device;
      states_.push_back(span_of(view, width()));
    }
    for (const py::object& scalar : scalars) scalars_.push_back(address(torch.view(scalar.ptr())));
    partials_ = span_of(torch.view(partials.ptr()), sizeof(double));
    slices_ = static_cast<const Slice*>(memory(slices));
    held_ = {py::cast(states), py::cast(scalars), partials, slices};
    for (size_t i = 0; i < count; ++i) {
      int64_t size = 1;
      for (const int64_t extent : shapes[i]) size *= extent;
      const int dtype = dtype_of(torch.view(examples[i].ptr()).dtype);
      if (dtype == kDTypes) throw py::type_error(op + ": unexpected dtype of a product");
      parts_.push_back({size, offsets[i], rows_});
      expected_.push_back({static_cast<DType>(dtype), shapes[i], strides[i], orders[i]});
      rows_ += (size + kChunk - 1) / kChunk;
      elements_ += size;
    }
    const int64_t listed = slices.is_none() ? 0 : torch.view(slices.ptr()).shape[0];
    if (device_.type == dlpack::kCuda && listed != rows_)
      throw py::value_error(op + ": slices: expected one for each row of partials");
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
      PyObject* item = PySequence_Fast_GET_ITEM(sequence.ptr(), static_cast<Py_ssize_t>(i));
      if (readable(i, item, &read[i])) continue;
      copies.push_back(conform_(i, py::handle(item)));
      read[i] = {
          reinterpret_cast<const void*>(address(Torch::get().view(copies.back().ptr()))), state_dtype_, {}};
    }
    run(read);
  }

 private:
  struct Span {
    uintptr_t begin, end;
  };

  static Span span_of(const dlpack::Tensor& view, uintptr_t width) {
    return {address(view), address(view) + static_cast<uintptr_t>(numel(view)) * width};
  }

  // Whether a product can be read where it is; if so, `product` says where.
  bool readable(size_t index, PyObject* item, Product* product) const {
    const Torch& torch = Torch::get();
    const Expected& expected = expected_[index];
    dlpack::Tensor view;
    if (!torch.try_view(item, &view)) return false;  // conform says what is wrong
    if (view.device.type != device_.type || view.device.index != device_.index ||
        dtype_of(view.dtype) != static_cast<int>(expected.dtype) ||
        view.dimensions != static_cast<int32_t>(expected.shape.size())) {
      return false;
    }
    bool in_order = true;
    int64_t extent = 1;  // from the first element to the last
    for (int32_t d = 0; d < view.dimensions; ++d) {
      if (view.shape[d] != expected.shape[d]) return false;
      in_order &= view.shape[d] == 1 || view.strides[d] == expected.strides[d];
      extent += (view.shape[d] - 1) * view.strides[d];
    }
    *product = {reinterpret_cast<const void*>(address(view)), expected.dtype, {}};
    if (parts_[index].numel == 0) return true;
    if (!in_order) {
      if (device_.type != dlpack::kCpu) return false;
      product->walk = walk_of(expected.order, view.shape, view.strides);
    }
    return apart(index, address(view), extent, in_order) && !torch.negated(item);
  }

  // Whether a product is apart from all memory that the op writes. It may be a state's own part, where each
  // element is read before it is written.
  bool apart(size_t index, uintptr_t begin, int64_t extent, bool in_order) const {
    const DType dtype = expected_[index].dtype;
    const uintptr_t end = begin + static_cast<uintptr_t>(extent * kWidths[static_cast<int>(dtype)]);
    if (begin < partials_.end && partials_.begin < end) return false;
    const auto offset = static_cast<uintptr_t>(parts_[index].offset) * width();
    for (const Span& state : states_) {
      if (begin >= state.end || state.begin >= end) continue;
      if (!in_order || dtype != state_dtype_ || begin != state.begin + offset) return false;
    }
    return true;
  }

  void run(const std::vector<Product>& products) const {
    const bool wide = state_dtype_ == DType::kFloat64;
    Step step{code_,  wide,     {},    {},     damping_, reinterpret_cast<double*>(partials_.begin),
              parts_, products, rows_, slices_};
    for (size_t i = 0; i < states_.size(); ++i) step.states[i] = reinterpret_cast<void*>(states_[i].begin);
    for (size_t i = 0; i < scalars_.size(); ++i)
      step.scalars[i] = reinterpret_cast<const double*>(scalars_[i]);
    if (device_.type == dlpack::kCuda) {
      run_on_cuda(step);
    } else if (elements_ < kReleaseElements) {
      run_cpu(step, 1);
    } else {
      const int threads = elements_ < kParallelElements ? 1 : py::cast<int>(Torch::get().threads());
      const py::gil_scoped_release release;
      run_cpu(step, threads);
    }
  }

  void run_on_cuda([[maybe_unused]] const Step& step) const {
#ifdef HVP_HAS_CUDA
    on_current_stream(device_, [&](void* stream) { run_cuda(step, device_.index, stream); });
#else
    throw std::runtime_error("the extension was built without CUDA");
#endif
  }

  uintptr_t width() const { return static_cast<uintptr_t>(kWidths[static_cast<int>(state_dtype_)]); }

  OpCode code_;
  double damping_;
  DType state_dtype_ = DType::kFloat32;
  dlpack::Device device_{dlpack::kCpu, 0};
  std::vector<Span> states_;
  std::vector<uintptr_t> scalars_;
  Span partials_;
  std::vector<Part> parts_;
  std::vector<Expected> expected_;
  int64_t rows_ = 0, elements_ = 0;
  const Slice* slices_;
  std::vector<py::object> held_;  // keeps the memory behind the addresses alive
  py::object conform_;
};

}  // namespace

void bind_plan(py::module_& module) {
  using Sizes = std::vector<int64_t>;
  using Objects = std::vector<py::object>;
  py::class_<Plan>(module, "Plan", "An op bound to its state; calling it with the products runs it.")
      .def(py::init<const std::string&, const Objects&, const std::vector<Sizes>&, const std::vector<Sizes>&,
                    const std::vector<Sizes>&, const Objects&, const Sizes&, const Objects&, double,
                    const py::object&, const py::object&, py::object>(),
           py::arg("op"), py::arg("states"), py::arg("shapes"), py::arg("strides"), py::arg("orders"),
           py::arg("examples"), py::arg("offsets"), py::arg("scalars"), py::arg("damping"),
           py::arg("partials"), py::arg("slices"), py::arg("conform"))
      .def("__call__", &Plan::operator(), py::arg("products"));
}

}  // namespace hvp
