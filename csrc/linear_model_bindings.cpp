// The computations on a linear model's Hessian, for hvp_engine.ops.cpp.
#include "bindings.h"
#include "torch_tensors.h"
#include "variants.h"

namespace hvp {
namespace {

// Below this many multiplications in one term one thread is faster than waking others.
constexpr int64_t kParallelProducts = int64_t{1} << 20;

// The caller has checked that everything is on the CPU, of one type and laid out as LinearModel says;
// `state` has one flat vector in each of its rows.
LinearModel linear_model(const py::object& state, const py::object& inputs, const py::object& curvature,
                         const py::object& probabilities, const py::object& decay, const py::object& gram,
                         int64_t bias) {
  const Torch& torch = Torch::get();
  const dlpack::Tensor vectors = torch.view(state.ptr()), x = torch.view(inputs.ptr()),
                       factors = torch.view(curvature.ptr());
  LinearModel model{};
  model.wide = dtype_of(vectors.dtype) == static_cast<int>(DType::kFloat64);
  model.batch = vectors.shape[0];
  model.size = vectors.shape[1];
  model.samples = x.shape[0];
  model.features = x.shape[1];
  model.input_stride = x.strides[0];
  model.outputs = factors.shape[0];
  model.padded_samples = factors.shape[1];
  model.bias = bias;
  model.inputs = memory(inputs);
  model.curvature = memory(curvature);
  model.probabilities = memory(probabilities);
  model.decay = memory(decay);
  model.gram = memory(gram);
  return model;
}

int threads_for(const LinearModel& model) {
  const int64_t columns = model.gram == nullptr ? model.features : model.samples;
  const bool small = model.batch * model.outputs * model.samples * columns < kParallelProducts;
  return small ? 1 : py::cast<int>(Torch::get().threads());
}

// All terms for the right-hand sides in the rows of `v`. The form is dual where there is a Gram matrix.
void linear_model_neumann(const py::object& v, const py::object& p, const py::object& figures,
                          const py::object& inputs, const py::object& curvature,
                          const py::object& probabilities, const py::object& decay, const py::object& gram,
                          int64_t bias, double alpha, double damping, int64_t iterations, bool horner) {
  const LinearModel model = linear_model(v, inputs, curvature, probabilities, decay, gram, bias);
  const int threads = threads_for(model);
  void* const terms = memory(v);
  void* const sums = memory(p);
  auto* const numbers = static_cast<double*>(memory(figures));
  const py::gil_scoped_release release;
  const LinearModelKernel kernel =
      model.gram == nullptr ? variant().linear_model_direct : variant().linear_model_dual;
  kernel(model, {alpha, damping, iterations, horner}, terms, sums, numbers, threads);
}

// `coefficients` has two numbers for each term; `figures` is zero on entry.
void linear_model_chebyshev(const py::object& residual, const py::object& direction, const py::object& x,
                            const py::object& figures, const py::object& coefficients,
                            const py::object& inputs, const py::object& curvature,
                            const py::object& probabilities, const py::object& decay, int64_t bias,
                            double damping) {
  const LinearModel model = linear_model(residual, inputs, curvature, probabilities, decay, py::none(), bias);
  const int threads = threads_for(model);
  const int64_t terms = Torch::get().view(coefficients.ptr()).shape[0];
  void* const state[] = {memory(residual), memory(direction), memory(x)};
  const auto* const table = static_cast<const double*>(memory(coefficients));
  auto* const numbers = static_cast<double*>(memory(figures));
  const py::gil_scoped_release release;
  variant().linear_model_chebyshev(model, {table, damping, terms - 1}, state[0], state[1], state[2], numbers,
                                   threads);
}

// Lanczos from the first row of `basis`; `figures` has the diagonal and the off-diagonal in its two rows.
void linear_model_lanczos(const py::object& basis, const py::object& figures, const py::object& inputs,
                          const py::object& curvature, const py::object& probabilities,
                          const py::object& decay, int64_t bias) {
  LinearModel model = linear_model(basis, inputs, curvature, probabilities, decay, py::none(), bias);
  const int64_t steps = model.batch;
  model.batch = 1;
  const int threads = threads_for(model);
  void* const vectors = memory(basis);
  auto* const numbers = static_cast<double*>(memory(figures));
  const py::gil_scoped_release release;
  variant().linear_model_lanczos(model, vectors, numbers, numbers + steps, steps, threads);
}

}  // namespace

void bind_linear_model(py::module_& module) {
  module.def("linear_model_neumann", &linear_model_neumann,
             "All terms of the Neumann series for a linear model.", py::kw_only(), py::arg("v"), py::arg("p"),
             py::arg("figures"), py::arg("inputs"), py::arg("curvature"), py::arg("probabilities"),
             py::arg("decay"), py::arg("gram"), py::arg("bias"), py::arg("alpha"), py::arg("damping"),
             py::arg("iterations"), py::arg("horner"));
  module.def("linear_model_chebyshev", &linear_model_chebyshev,
             "All terms of a Chebyshev iteration for a linear model.", py::kw_only(), py::arg("residual"),
             py::arg("direction"), py::arg("x"), py::arg("figures"), py::arg("coefficients"),
             py::arg("inputs"), py::arg("curvature"), py::arg("probabilities"), py::arg("decay"),
             py::arg("bias"), py::arg("damping"));
  module.def("linear_model_lanczos", &linear_model_lanczos, "A Lanczos run for a linear model.",
             py::kw_only(), py::arg("basis"), py::arg("figures"), py::arg("inputs"), py::arg("curvature"),
             py::arg("probabilities"), py::arg("decay"), py::arg("bias"));
}

}  // namespace hvp
