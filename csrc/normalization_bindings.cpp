// Normalizations for hvp_engine.differentiable, which has checked that all tensors are dense in the layout
// that is said, on the CPU, of one floating type, and fit together.
#include "bindings.h"
#include "torch_tensors.h"
#include "variants.h"

namespace hvp {
namespace {

void normalize(const NormalizedShape& shape, int level, double eps, const py::object& input,
               const py::object& weight, const py::object& mean, const py::object& variance,
               const py::object& bias, const py::object& grad, const py::object& tangent,
               const py::object& tangent_weight, const py::object& tangent_bias, const py::object& output,
               const py::object& input_product, const py::object& weight_product,
               const py::object& bias_product) {
  const dlpack::Tensor view = Torch::get().view(input.ptr());
  Normalization given{shape};
  given.level = static_cast<Level>(level);
  given.wide = is_wide(view);
  given.eps = eps;
  given.input = memory(input);
  given.weight = memory(weight);
  given.bias = memory(bias);
  given.grad = memory(grad);
  given.tangent = memory(tangent);
  given.tangent_weight = memory(tangent_weight);
  given.tangent_bias = memory(tangent_bias);
  given.mean = static_cast<double*>(memory(mean));
  given.variance = static_cast<double*>(memory(variance));
  given.output = memory(output);
  given.input_product = memory(input_product);
  given.weight_product = memory(weight_product);
  given.bias_product = memory(bias_product);
  const int threads = threads_for(numel(view));
  const py::gil_scoped_release release;
  (shape.rows ? variant().normalize_rows : variant().normalize_images)(given, threads);
}

}  // namespace

void bind_normalization(py::module_& module) {
  const py::object none = py::none();
  py::class_<NormalizedShape>(module, "NormalizedShape",
                              "How numbers lie in memory, and over which statistics are made.")
      .def(py::init([](bool rows, bool centred, bool channels_last, int64_t samples, int64_t images,
                       int64_t channels, int64_t points, int64_t groups) {
             return NormalizedShape{rows, centred, channels_last, samples, images, channels, points, groups};
           }),
           py::kw_only(), py::arg("rows"), py::arg("centred"), py::arg("channels_last"), py::arg("samples"),
           py::arg("images"), py::arg("channels"), py::arg("points"), py::arg("groups"));
  module.def("normalize", &normalize, "Numbers normalized (level 0), or one of the derivatives.",
             py::arg("shape"), py::kw_only(), py::arg("level"), py::arg("eps"), py::arg("input"),
             py::arg("weight"), py::arg("mean"), py::arg("variance"), py::arg("bias") = none,
             py::arg("grad") = none, py::arg("tangent") = none, py::arg("tangent_weight") = none,
             py::arg("tangent_bias") = none, py::arg("output") = none, py::arg("input_product") = none,
             py::arg("weight_product") = none, py::arg("bias_product") = none);
}

}  // namespace hvp
