// Normalizations for hvp_engine.differentiable, which has checked that all tensors are dense in the layout
// that is said, on the CPU, of one floating type, and fit together.
#include "bindings.h"
#include "torch_tensors.h"
#include "variants.h"

namespace hvp {
namespace {

// Elements below which one thread is faster than waking others.
constexpr int64_t kParallel = int64_t{1} << 16;

Normalization problem(Level level, const py::object& input, const py::object& weight, const py::object& mean,
                      const py::object& variance, double eps) {
  Normalization given{};
  given.level = level;
  given.wide = dtype_of(Torch::get().view(input.ptr()).dtype) == static_cast<int>(DType::kFloat64);
  given.eps = eps;
  given.input = memory(input);
  given.weight = memory(weight);
  given.mean = static_cast<double*>(memory(mean));
  given.variance = static_cast<double*>(memory(variance));
  return given;
}

struct Shape {
  bool rows, centred, channels_last;
  int64_t samples, images, channels, points, groups;
};

void run(Normalization& given, const Shape& shape) {
  given.centred = shape.centred;
  given.channels_last = shape.channels_last;
  given.samples = shape.samples;
  given.images = shape.images;
  given.channels = shape.channels;
  given.points = shape.points;
  given.groups = shape.groups;
  const int64_t elements = shape.samples * shape.images * shape.channels * shape.points;
  const int threads = elements < kParallel ? 1 : py::cast<int>(Torch::get().threads());
  const py::gil_scoped_release release;
  (shape.rows ? variant().normalize_rows : variant().normalize_images)(given, threads);
}

void normalize(const Shape& shape, const py::object& output, const py::object& mean,
               const py::object& variance, const py::object& input, const py::object& weight,
               const py::object& bias, double eps) {
  Normalization given = problem(Level::kValue, input, weight, mean, variance, eps);
  given.bias = memory(bias);
  given.output = memory(output);
  run(given, shape);
}

void normalize_backward(const Shape& shape, const py::object& input_product, const py::object& weight_product,
                        const py::object& bias_product, const py::object& grad, const py::object& input,
                        const py::object& weight, const py::object& mean, const py::object& variance,
                        double eps) {
  Normalization given = problem(Level::kBackward, input, weight, mean, variance, eps);
  given.grad = memory(grad);
  given.input_product = memory(input_product);
  given.weight_product = memory(weight_product);
  given.bias_product = memory(bias_product);
  run(given, shape);
}

void normalize_double_backward(const Shape& shape, const py::object& grad_product,
                               const py::object& input_product, const py::object& weight_product,
                               const py::object& tangent, const py::object& tangent_weight,
                               const py::object& tangent_bias, const py::object& grad,
                               const py::object& input, const py::object& weight, const py::object& mean,
                               const py::object& variance, double eps) {
  Normalization given = problem(Level::kDoubleBackward, input, weight, mean, variance, eps);
  given.grad = memory(grad);
  given.tangent = memory(tangent);
  given.tangent_weight = memory(tangent_weight);
  given.tangent_bias = memory(tangent_bias);
  given.output = memory(grad_product);
  given.input_product = memory(input_product);
  given.weight_product = memory(weight_product);
  run(given, shape);
}

}  // namespace

void bind_normalization(py::module_& module) {
  py::class_<Shape>(module, "NormalizedShape",
                    "How numbers lie in memory, and over which statistics are made.")
      .def(py::init([](bool rows, bool centred, bool channels_last, int64_t samples, int64_t images,
                       int64_t channels, int64_t points, int64_t groups) {
             return Shape{rows, centred, channels_last, samples, images, channels, points, groups};
           }),
           py::kw_only(), py::arg("rows"), py::arg("centred"), py::arg("channels_last"), py::arg("samples"),
           py::arg("images"), py::arg("channels"), py::arg("points"), py::arg("groups"));
  module.def("normalize", &normalize, "Normalized numbers and their statistics.", py::arg("shape"),
             py::arg("output"), py::arg("mean"), py::arg("variance"), py::arg("input"), py::arg("weight"),
             py::arg("bias"), py::arg("eps"));
  module.def("normalize_backward", &normalize_backward, "The derivative of normalize.", py::arg("shape"),
             py::arg("input_product"), py::arg("weight_product"), py::arg("bias_product"), py::arg("grad"),
             py::arg("input"), py::arg("weight"), py::arg("mean"), py::arg("variance"), py::arg("eps"));
  module.def("normalize_double_backward", &normalize_double_backward, "The derivative of normalize_backward.",
             py::arg("shape"), py::arg("grad_product"), py::arg("input_product"), py::arg("weight_product"),
             py::arg("tangent"), py::arg("tangent_weight"), py::arg("tangent_bias"), py::arg("grad"),
             py::arg("input"), py::arg("weight"), py::arg("mean"), py::arg("variance"), py::arg("eps"));
}

}  // namespace hvp
