// Cross-entropy and log-softmax for hvp_engine.differentiable, which has checked that all tensors are dense,
// on the CPU, of one floating type, and fit together.
#include "bindings.h"
#include "torch_tensors.h"
#include "variants.h"

namespace hvp {
namespace {

// Elements below which one thread is faster than waking others.
constexpr int64_t kParallel = int64_t{1} << 16;

int threads_for(int64_t elements) { return elements < kParallel ? 1 : py::cast<int>(Torch::get().threads()); }

bool is_wide(const py::object& tensor) {
  return dtype_of(Torch::get().view(tensor.ptr()).dtype) == static_cast<int>(DType::kFloat64);
}

CrossEntropy given(const py::object& logits, const py::object& target, const py::object& weight,
                   double weight_total, int64_t ignored, double smoothing) {
  const dlpack::Tensor view = Torch::get().view(logits.ptr());
  CrossEntropy given{};
  given.wide = is_wide(logits);
  given.rows = view.shape[0];
  given.classes = view.shape[1];
  given.ignored = ignored;
  given.smoothing = smoothing;
  given.target = static_cast<const int64_t*>(memory(target));
  given.weight = memory(weight);
  given.weight_total = weight_total;
  given.logits = memory(logits);
  return given;
}

int64_t cross_entropy(const py::object& losses, const py::object& log_sum_exp, const py::object& logits,
                      const py::object& target, const py::object& weight, double weight_total,
                      int64_t ignored, double smoothing) {
  const CrossEntropy problem = given(logits, target, weight, weight_total, ignored, smoothing);
  const int threads = threads_for(problem.rows * problem.classes);
  void* const to = memory(losses);
  void* const lse = memory(log_sum_exp);
  const py::gil_scoped_release release;
  return variant().cross_entropy(problem, to, lse, threads);
}

int64_t cross_entropy_backward(const py::object& gradient, const py::object& grad,
                               const py::object& log_sum_exp, const py::object& logits,
                               const py::object& target, const py::object& weight, double weight_total,
                               int64_t ignored, double smoothing) {
  const CrossEntropy problem = given(logits, target, weight, weight_total, ignored, smoothing);
  const int threads = threads_for(problem.rows * problem.classes);
  void* const to = memory(gradient);
  const void* const factors = memory(grad);
  const void* const lse = memory(log_sum_exp);
  const py::gil_scoped_release release;
  return variant().cross_entropy_backward(problem, factors, lse, to, threads);
}

int64_t cross_entropy_double_backward(const py::object& grad_product, const py::object& product,
                                      const py::object& tangent, const py::object& grad,
                                      const py::object& log_sum_exp, const py::object& logits,
                                      const py::object& target, const py::object& weight, double weight_total,
                                      int64_t ignored, double smoothing) {
  const CrossEntropy problem = given(logits, target, weight, weight_total, ignored, smoothing);
  const int threads = threads_for(problem.rows * problem.classes);
  void* const to[] = {memory(grad_product), memory(product)};
  const void* const from[] = {memory(tangent), memory(grad), memory(log_sum_exp)};
  const py::gil_scoped_release release;
  return variant().cross_entropy_double_backward(problem, from[0], from[1], from[2], to[0], to[1], threads);
}

void log_softmax(const py::object& output, const py::object& input) {
  const dlpack::Tensor view = Torch::get().view(input.ptr());
  const int threads = threads_for(numel(view));
  const bool wide = is_wide(input);
  void* const to = memory(output);
  const void* const from = memory(input);
  const py::gil_scoped_release release;
  variant().log_softmax(wide, view.shape[0], view.shape[1], from, to, threads);
}

LogSoftmax given(const py::object& output) {
  const dlpack::Tensor view = Torch::get().view(output.ptr());
  return {is_wide(output), view.shape[0], view.shape[1], memory(output)};
}

void log_softmax_backward(const py::object& gradient, const py::object& grad, const py::object& output) {
  const LogSoftmax problem = given(output);
  const int threads = threads_for(problem.rows * problem.classes);
  void* const to = memory(gradient);
  const void* const from = memory(grad);
  const py::gil_scoped_release release;
  variant().log_softmax_backward(problem, from, to, threads);
}

void log_softmax_double_backward(const py::object& grad_product, const py::object& product,
                                 const py::object& tangent, const py::object& grad,
                                 const py::object& output) {
  const LogSoftmax problem = given(output);
  const int threads = threads_for(problem.rows * problem.classes);
  void* const to[] = {memory(grad_product), memory(product)};
  const void* const from[] = {memory(tangent), memory(grad)};
  const py::gil_scoped_release release;
  variant().log_softmax_double_backward(problem, from[0], from[1], to[0], to[1], threads);
}

}  // namespace

void bind_cross_entropy(py::module_& module) {
  module.def("cross_entropy", &cross_entropy,
             "Losses of rows of logits; the first row with a bad label, or -1.", py::arg("losses"),
             py::arg("log_sum_exp"), py::arg("logits"), py::arg("target"), py::arg("weight"),
             py::arg("weight_total"), py::arg("ignored"), py::arg("smoothing"));
  module.def("cross_entropy_backward", &cross_entropy_backward, "The derivative of cross_entropy.",
             py::arg("gradient"), py::arg("grad"), py::arg("log_sum_exp"), py::arg("logits"),
             py::arg("target"), py::arg("weight"), py::arg("weight_total"), py::arg("ignored"),
             py::arg("smoothing"));
  module.def("cross_entropy_double_backward", &cross_entropy_double_backward,
             "The derivative of cross_entropy_backward.", py::arg("grad_product"), py::arg("product"),
             py::arg("tangent"), py::arg("grad"), py::arg("log_sum_exp"), py::arg("logits"),
             py::arg("target"), py::arg("weight"), py::arg("weight_total"), py::arg("ignored"),
             py::arg("smoothing"));
  module.def("log_softmax", &log_softmax, "Of rows.", py::arg("output"), py::arg("input"));
  module.def("log_softmax_backward", &log_softmax_backward, "The derivative of log_softmax.",
             py::arg("gradient"), py::arg("grad"), py::arg("output"));
  module.def("log_softmax_double_backward", &log_softmax_double_backward,
             "The derivative of log_softmax_backward.", py::arg("grad_product"), py::arg("product"),
             py::arg("tangent"), py::arg("grad"), py::arg("output"));
}

}  // namespace hvp
