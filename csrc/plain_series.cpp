// The terms of a Neumann series whose products autograd makes, without a line of Python between them. A model
// of 20 weights spends more on what is around its products than on them.
#include <algorithm>
#include <vector>

#include "bindings.h"
#include "torch_tensors.h"
#include "variants.h"

namespace hvp {
namespace {

// A dense tensor of the CPU, row after row, and what it has.
struct Dense {
  char* data;
  int64_t numel;
  DType dtype;
};

// Whether `tensor` is one of those that this can read; it may be anything.
bool read(PyObject* tensor, Dense* dense) {
  const Torch& torch = Torch::get();
  dlpack::Tensor view;
  if (!torch.try_view(tensor, &view)) return false;
  const int dtype = dtype_of(view.dtype);
  const bool known = dtype == static_cast<int>(DType::kFloat32) || dtype == static_cast<int>(DType::kFloat64);
  if (!known || view.device.type != dlpack::kCpu) return false;
  int64_t expected = 1;
  for (int32_t d = view.dimensions; d-- > 0;) {
    if (view.shape[d] != 1 && view.strides[d] != expected) return false;
    expected *= view.shape[d];
  }
  *dense = {reinterpret_cast<char*>(address(view)), expected, static_cast<DType>(dtype)};
  return !torch.negated(tensor);
}

// Reads as many tensors as there are `like` ones, all of their sizes; false if some cannot be read.
bool read_all(const py::sequence& tensors, const std::vector<Dense>& like, std::vector<Dense>* found) {
  found->clear();
  if (tensors.size() != like.size()) return false;
  for (size_t i = 0; i < like.size(); ++i) {
    Dense dense;
    if (!read(py::object(tensors[i]).ptr(), &dense) || dense.numel != like[i].numel ||
        dense.dtype != like[i].dtype) {
      return false;
    }
    found->push_back(dense);
  }
  return true;
}

struct Sums {
  double first = 0, second = 0, bad = 0;
};

class Series {
 public:
  Series(double alpha, double damping) : alpha_(alpha) {
    scalars_.value[0] = alpha;
    scalars_.damping = damping;
  }

  // False if the vectors are not all alike, dense and on the CPU.
  bool start(const py::sequence& v, const py::sequence& p) {
    for (size_t i = 0; i < v.size(); ++i) {
      Dense dense;
      if (!read(py::object(v[i]).ptr(), &dense) || (i > 0 && dense.dtype != v_[0].dtype)) return false;
      v_.push_back(dense);
    }
    if (v_.empty() || !read_all(p, v_, &p_)) return false;
    wide_ = v_[0].dtype == DType::kFloat64;
    kernel_ = variant().chunk_kernel(OpCode::neumann_step_horner, false, wide_, v_[0].dtype);
    for (const Dense& one : v_) add_squares(one);
    return true;
  }

  // p <- p + v - alpha (product + damping p); false if a product is not dense.
  bool step(const py::sequence& products) {
    if (!read_all(products, v_, &products_)) return false;
    for (Dense& product : products_) keep_apart(&product);
    last_ = Sums();
    for (size_t i = 0; i < v_.size(); ++i) {
      void* states[kMaxStates] = {p_[i].data, v_[i].data, nullptr};
      const int64_t size = wide_ ? sizeof(double) : sizeof(float);
      for (int64_t start = 0; start < v_[i].numel; start += kChunk) {
        const int64_t count = std::min<int64_t>(kChunk, v_[i].numel - start);
        double row[3];
        kernel_(products_[i].data + start * size, states, start, count, scalars_, row);
        last_.first += row[0];
        last_.second += row[1];
        last_.bad += row[2];
      }
    }
    copies_.clear();
    return true;
  }

  // p <- alpha p; the figures that hvp_engine.solvers.neumann.outcome_of takes.
  py::tuple finish() {
    for (const Dense& one : p_) {
      if (wide_) {
        scale(reinterpret_cast<double*>(one.data), one.numel);
      } else {
        scale(reinterpret_cast<float*>(one.data), one.numel);
      }
    }
    return py::make_tuple(of_v_.first, of_v_.second, of_v_.bad, last_.first, last_.second, last_.bad);
  }

 private:
  template <class T>
  void scale(T* values, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) values[i] *= static_cast<T>(alpha_);
  }

  void add_squares(const Dense& dense) {
    for (int64_t i = 0; i < dense.numel; ++i) {
      const double value = wide_ ? reinterpret_cast<double*>(dense.data)[i]
                                 : static_cast<double>(reinterpret_cast<float*>(dense.data)[i]);
      of_v_.first += value * value;
      of_v_.bad += value * 0.0 == 0 ? 0 : 1;
    }
  }

  // Of a loss such as (w1 * w2).sum() the product for w1 is the tangent of w2 itself, which the update
  // changes.
  void keep_apart(Dense* product) {
    const int64_t size = product->numel * (wide_ ? sizeof(double) : sizeof(float));
    for (const Dense& one : p_) {
      const int64_t other = one.numel * (wide_ ? sizeof(double) : sizeof(float));
      if (product->data < one.data + other && one.data < product->data + size) {
        copies_.emplace_back(product->data, product->data + size);
        product->data = copies_.back().data();
        return;
      }
    }
  }

  double alpha_;
  Scalars scalars_{};
  bool wide_ = false;
  ChunkKernel kernel_ = nullptr;
  std::vector<Dense> v_, p_, products_;
  std::vector<std::vector<char>> copies_;
  Sums of_v_, last_;
};

}  // namespace

void bind_plain_series(py::module_& module) {
  module.def(
      "plain_series",
      [](const py::function& product, const py::sequence& v, const py::tuple& p, int64_t terms, double alpha,
         double damping) -> py::object {
        Series series(alpha, damping);
        if (!series.start(v, p)) return py::none();
        for (int64_t i = 0; i < terms; ++i) {
          if (!series.step(py::sequence(product()))) return py::none();
        }
        return series.finish();
      },
      py::arg("product"), py::arg("v"), py::arg("p"), py::arg("terms"), py::arg("alpha"), py::arg("damping"),
      "Neumann terms in p, which is v before, from products with what p is then; the figures of the solve, "
      "or "
      "None where some tensor is not dense, float32 or float64, and on the CPU.");
}

}  // namespace hvp
