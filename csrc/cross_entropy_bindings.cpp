// Cross-entropy and log-softmax for hvp_engine.differentiable, which has checked that all tensors are dense,
// on the CPU, of one floating type, and fit together.
#include "bindings.h"
#include "torch_tensors.h"
#include "variants.h"

namespace hvp {
namespace {

int64_t cross_entropy(int level, const py::object& logits, const py::object& target, const py::object& weight,
                      double weight_total, int64_t ignored, double smoothing, const py::object& log_sum_exp,
                      const py::object& grad, const py::object& tangent, const py::object& per_row,
                      const py::object& product) {
  const dlpack::Tensor view = Torch::get().view(logits.ptr());
  CrossEntropy given{};
  given.level = static_cast<Level>(level);
  given.wide = is_wide(view);
  given.rows = view.shape[0];
  given.classes = view.shape[1];
  given.ignored = ignored;
  given.smoothing = smoothing;
  given.target = static_cast<const int64_t*>(memory(target));
  given.weight = memory(weight);
  given.weight_total = weight_total;
  given.logits = memory(logits);
  given.grad = memory(grad);
  given.tangent = memory(tangent);
  given.log_sum_exp = memory(log_sum_exp);
  given.per_row = memory(per_row);
  given.product = memory(product);
  const int threads = threads_for(numel(view));
  const py::gil_scoped_release release;
  return variant().cross_entropy(given, threads);
}

void log_softmax(int level, const py::object& from, const py::object& grad, const py::object& tangent,
                 const py::object& first, const py::object& second) {
  const dlpack::Tensor view = Torch::get().view(from.ptr());
  const LogSoftmax given{
      static_cast<Level>(level), is_wide(view), view.shape[0], view.shape[1], memory(from), memory(grad),
      memory(tangent),           memory(first), memory(second)};
  const int threads = threads_for(numel(view));
  const py::gil_scoped_release release;
  variant().log_softmax(given, threads);
}

}  // namespace

void bind_cross_entropy(py::module_& module) {
  const py::object none = py::none();
  module.def("cross_entropy", &cross_entropy,
             "Of rows of logits (level 0), or one of its derivatives; the first row with a bad label, or -1.",
             py::kw_only(), py::arg("level"), py::arg("logits"), py::arg("target"), py::arg("weight"),
             py::arg("weight_total"), py::arg("ignored"), py::arg("smoothing"), py::arg("log_sum_exp"),
             py::arg("grad") = none, py::arg("tangent") = none, py::arg("per_row") = none,
             py::arg("product") = none);
  module.def("log_softmax", &log_softmax, "Of rows (level 0), or one of its derivatives.", py::kw_only(),
             py::arg("level"), py::arg("given"), py::arg("grad") = none, py::arg("tangent") = none,
             py::arg("first"), py::arg("second") = none);
}

}  // namespace hvp
