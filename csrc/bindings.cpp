// The module hvp_engine._C; hvp_engine.ops.cpp is the way in.
#include "bindings.h"

#include "torch_tensors.h"
#include "variants.h"
#ifdef HVP_HAS_CUDA
#include "cuda.h"
#endif

PYBIND11_MODULE(_C, module) {
  namespace py = pybind11;
  hvp::Torch::get();  // fails here, on import, where torch does not fit
  const py::object capability =
      py::module_::import("torch").attr("backends").attr("cpu").attr("get_cpu_capability")();
  module.doc() = "Fused vector ops in C++ and CUDA; hvp_engine.ops.cpp is the way in.";
#ifdef HVP_HAS_CUDA
  module.attr("has_cuda") = true;
  module.def("cuda_problem", &hvp::cuda_problem, "Why CUDA cannot be used on this machine; empty if it can.");
#else
  module.attr("has_cuda") = false;
#endif
  hvp::choose_variant(py::cast<std::string>(capability));
  module.attr("cpu_variant") = hvp::variant().name;
  hvp::bind_attention(module);
  hvp::bind_plan(module);
  hvp::bind_recurrence(module);
  hvp::bind_program(module);
  hvp::bind_graph_contents(module);
  hvp::bind_plain_series(module);
  hvp::bind_recurrent(module);
  hvp::bind_cross_entropy(module);
  hvp::bind_normalization(module);
}
