// Attention and its derivatives, for hvp_engine.differentiable.attention.cpp.
#include <cstdlib>
#include <memory>

#include "attention.h"
#include "bindings.h"
#include "torch_tensors.h"
#include "variants.h"

namespace hvp {
namespace {

// Below this many multiplications one thread is faster than waking others.
constexpr int64_t kParallelProducts = int64_t{1} << 22;

// An operand of batch x heads x rows x width, whose rows the caller has made contiguous.
AttentionRows rows(const py::object& tensor) {
  if (tensor.is_none()) return {};
  const dlpack::Tensor view = Torch::get().view(tensor.ptr());
  return {reinterpret_cast<const void*>(address(view)), view.strides[0], view.strides[1], view.strides[2]};
}

// The caller has checked that everything is on the CPU, of one type and of shapes that fit.
void run_attention(int level, const py::object& query, const py::object& key, const py::object& value,
                   const py::object& grad_output, const py::object& grad_grad_query,
                   const py::object& grad_grad_key, const py::object& grad_grad_value,
                   const py::sequence& results, const py::object& mask, const py::object& seed,
                   double dropout_p, uint32_t threshold, bool is_causal, double scale) {
  const Torch& torch = Torch::get();
  const dlpack::Tensor q = torch.view(query.ptr()), k = torch.view(key.ptr()), v = torch.view(value.ptr());
  Attention p{};
  p.wide = is_wide(q);
  p.batch = q.shape[0];
  p.heads = q.shape[1];
  p.queries = q.shape[2];
  p.width = q.shape[3];
  p.key_heads = k.shape[1];
  p.keys = k.shape[2];
  p.value_width = v.shape[3];
  p.scale = scale;
  p.causal = is_causal;
  if (!mask.is_none()) {
    const dlpack::Tensor view = torch.view(mask.ptr());
    p.mask = reinterpret_cast<const void*>(address(view));
    p.mask_kind = view.dtype.code == dlpack::kFloat ? AttentionMask::kAdded : AttentionMask::kBoolean;
    for (int d = 0; d < 4; ++d) p.mask_strides[d] = view.shape[d] == 1 ? 0 : view.strides[d];
  }
  if (!seed.is_none()) {
    p.dropout = true;
    p.keep = 1 - dropout_p;
    p.threshold = threshold;
    p.seed = *static_cast<const uint64_t*>(memory(seed));
  }
  p.query = rows(query);
  p.key = rows(key);
  p.value = rows(value);
  p.grad_output = rows(grad_output);
  p.grad_grad_query = rows(grad_grad_query);
  p.grad_grad_key = rows(grad_grad_key);
  p.grad_grad_value = rows(grad_grad_value);
  for (size_t i = 0; i < results.size(); ++i) p.results[i] = memory(results[i]);
  const bool small = p.batch * p.heads * p.queries * p.keys * (p.width + p.value_width) * (2 + 2 * level) <
                     kParallelProducts;
  const int threads = small ? 1 : py::cast<int>(torch.threads());
  const py::gil_scoped_release release;
  const int64_t width = p.wide ? 8 : 4, numbers = variant().attention_workspace(p, level);
  // In whole cache lines, so that threads write none together.
  const auto bytes =
      static_cast<size_t>((numbers * width + 63) / 64 * 64 *
                          std::min<int64_t>(threads, std::max<int64_t>(1, p.batch * p.key_heads)));
  const std::unique_ptr<void, decltype(&std::free)> workspace(
      std::aligned_alloc(64, std::max<size_t>(bytes, 64)), &std::free);
  if (workspace == nullptr) throw std::bad_alloc();
  variant().attention(p, level, workspace.get(), threads);
}

}  // namespace

void bind_attention(py::module_& module) {
  module.def("attention", &run_attention, "Attention (level 0) or one of its derivatives.", py::kw_only(),
             py::arg("level"), py::arg("query"), py::arg("key"), py::arg("value"), py::arg("grad_output"),
             py::arg("grad_grad_query"), py::arg("grad_grad_key"), py::arg("grad_grad_value"),
             py::arg("results"), py::arg("mask"), py::arg("seed"), py::arg("dropout_p"), py::arg("threshold"),
             py::arg("is_causal"), py::arg("scale"));
}

}  // namespace hvp
