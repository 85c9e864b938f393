"""What the package takes from torch's private side: there, as described, and named in one file only.

The canaries build graphs that the guards must refuse: one that fails says that torch has changed what a guard matches,
or has mended what it guards against.
"""

from __future__ import annotations

import ast
import ctypes
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

import hvp_engine as hvp
from hvp_engine._support import torch_compat, torch_compat_nodes
from hvp_engine.differentiation.double_backward import Tape, gradients

ROOT = Path(__file__).parent.parent
DTYPE = torch.float64
W = torch.tensor([0.5, -1.0, 2.0], dtype=DTYPE)

PRIVATE_NAMES = {
    *("_version", "_execution_engine", "_forward_cls", "_orig_mod", "_schema", "_pytree", "_python_dispatch"),
    *("_input_metadata", "_backward_hooks", "_sequence_nr", "_is_zerotensor"),
}
"""Attributes of torch's objects; other private attributes are our own."""

PRIVATE_TEXT = re.compile(r"torch\._|torch::|is not implemented|differentiate twice|WeightNorm|FakeTensors|donated")


def private(tree: ast.AST) -> Iterator[str]:
    """Names and texts of torch's private side in code; comments and docstrings may speak of them."""
    documentation = {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                path = f"{module}.{alias.name}".strip(".")
                if path.startswith("torch") and any(part.startswith(("_", "experimental")) for part in path.split(".")):
                    yield path
        elif isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            if re.match(r"torch(\.[a-z]\w*)*\._(?!_)", path) and not path.startswith("torch.ops."):
                yield path
            elif node.attr in PRIVATE_NAMES or node.attr.startswith("_foreach_"):
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documentation:
            yield from [node.value] if PRIVATE_TEXT.search(node.value) or node.value in PRIVATE_NAMES else []


def test_private_names_are_in_one_file() -> None:
    files = [
        path
        for folder in ("hvp_engine", "kernels", "baselines")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in ("torch_compat.py", "torch_compat_nodes.py", "torch_compat_traces.py")
    ]
    assert len(files) > 100
    found = {str(path.relative_to(ROOT)): sorted(set(private(ast.parse(path.read_text())))) for path in files}
    assert not {path: names for path, names in found.items() if names}
    assert len(set(private(ast.parse(Path(torch_compat.__file__).read_text())))) > 20


# Names.


def test_lists_of_tensors() -> None:
    a, b = [W.clone(), W[:2].clone()], [W + 1, W[:2] - 1]
    torch.testing.assert_close(torch_compat.foreach_norm(b), [x.norm() for x in b])
    torch_compat.foreach_copy_(a, b)
    torch.testing.assert_close(a, b)
    torch_compat.foreach_mul_(a, 2.0)
    torch.testing.assert_close(a, [2 * x for x in b])
    torch_compat.foreach_zero_(a)
    assert not any(x.any() for x in a)


def test_nothing_is_recorded_below_autograd() -> None:
    w = W.clone().requires_grad_()
    with torch_compat.below_autograd():
        assert (w * 2).grad_fn is None
    assert (w * 2).grad_fn is not None


def test_backward_is_grad_with_the_graph_kept() -> None:
    w, unused = W.clone().requires_grad_(), W.clone().requires_grad_()
    y = w.pow(3)
    for _ in range(2):
        found, none = torch_compat.backward((y,), (W,), (w, unused))
        again, _ = torch_compat.backward_at((y,), (W,), (w, unused))()
        assert found is not None and again is not None and torch.equal(found, again)
        torch.testing.assert_close(found, 3 * W**3)
        assert none is None
    assert w.grad is None


def test_in_backward_pass() -> None:
    seen = []
    w = W.clone().requires_grad_()
    y = w * 2
    y.register_hook(lambda _: seen.append(torch_compat.in_backward_pass()))
    y.sum().backward()
    assert seen == [True]
    assert not torch_compat.in_backward_pass()


def test_versions_count_changes() -> None:
    w = W.clone()
    before = torch_compat.version_of(w)
    w.add_(1)
    w[0] = 2
    assert torch_compat.version_of(w) == before + 2
    with torch.inference_mode():
        inference = W.clone()
    with pytest.raises(RuntimeError):
        torch_compat.version_of(inference)


def test_onednn_is_off_inside_the_block() -> None:
    before = torch_compat.onednn_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyError), torch_compat.without_onednn():
            assert not torch_compat.onednn_enabled()
            raise KeyError
    assert torch_compat.onednn_enabled() == before


@pytest.mark.gpu
def test_ending_an_allocation_to_a_pool_that_has_ended_is_refused() -> None:
    with pytest.raises(RuntimeError):
        torch_compat.end_allocation_to_pool(0, torch.cuda.graph_pool_handle())


def test_memory_format_and_dispatch() -> None:
    found = set()
    for shape in product((1, 2, 3), repeat=4):
        sizes = (*shape, 0), (*shape, 1), (*shape, 2), shape, (*shape[:3], 0), shape[:3], shape[:1]
        for x in (torch.empty(size) for size in sizes):
            for laid_out in (x.permute(order) for order in permutations(range(x.dim()))):
                for y in (laid_out, laid_out[:, :1], laid_out[..., ::2]) if x.dim() > 1 else (x,):
                    found.add(torch_compat.suggest_memory_format(y))
                    assert torch_compat.suggest_memory_format(y) is suggest_memory_format(y), (y.shape, y.stride())
    assert found == {torch.contiguous_format, torch.channels_last, torch.channels_last_3d}
    seen = []

    class Recorder(torch_compat.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Recorder():
        W + 1
    assert seen == [torch.ops.aten.add.Tensor]
    assert not torch_compat.is_traceable_wrapper_subclass(W)
    assert torch_compat.is_traceable_wrapper_subclass(torch.nested.nested_tensor([W], layout=torch.jagged))


def test_trees() -> None:
    leaves, spec = torch_compat.pytree.tree_flatten({"a": [1, (2, None)], "b": 3})
    assert leaves == [1, 2, None, 3]
    assert torch_compat.pytree.tree_unflatten(leaves, spec) == {"a": [1, (2, None)], "b": 3}
    assert callable(torch_compat.pytree.register_pytree_node)
    assert torch_compat.REGISTER_PYTREE.endswith("pytree.register_pytree_node")


def test_compiled_modules_keep_the_original() -> None:
    module = nn.Linear(2, 2)
    name, original = torch_compat.compiled_from(torch.compile(module)) or ("", None)
    assert original is module
    assert all(key.startswith(f"{name}.") for key, _ in torch.compile(module).named_parameters())
    assert torch_compat.compiled_from(module) is None


ARGUMENTS = {
    "convolution.default": "input weight bias stride padding dilation transposed output_padding groups",
    "convolution_backward.default": "grad_output input weight bias_sizes stride padding dilation transposed "
    "output_padding groups output_mask",
    "addmm.default": "self mat1 mat2 beta alpha",
    "baddbmm.default": "self batch1 batch2 beta alpha",
    "addcmul.default": "self tensor1 tensor2 value",
    "add.Tensor": "self other alpha",
    "mm.default": "self mat2",
    "bmm.default": "self mat2",
    "sum.dim_IntList": "self dim keepdim dtype",
    "select_backward.default": "grad_output input_sizes dim index",
    "slice.Tensor": "self dim start end step",
    "full.default": "size fill_value dtype layout device pin_memory",
    "full_like.default": "self fill_value dtype layout device pin_memory memory_format",
    "new_full.default": "self size fill_value dtype layout device pin_memory",
    "copy.default": "self src non_blocking",
    "threshold_backward.grad_input": "grad_output self threshold grad_input",
    "tanh_backward.grad_input": "grad_output output grad_input",
    "sigmoid_backward.grad_input": "grad_output output grad_input",
    "gelu_backward.grad_input": "grad_output self approximate grad_input",
}
"""Operations whose arguments rewrites read by place."""


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_operations(name: str) -> None:
    packet, overload = name.split(".")
    schema = torch_compat.schema_of(getattr(getattr(torch.ops.aten, packet), overload))
    assert [argument.name for argument in schema.arguments] == ARGUMENTS[name].split()
    assert torch_compat.schema_of(torch.sin) is None


def test_collectives_on_single_tensors() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for collective in (torch_compat.all_gather_single, torch_compat.reduce_scatter_single):
            found = torch.zeros_like(W)
            collective(found, W)
            torch.testing.assert_close(found, W)
    finally:
        torch.distributed.destroy_process_group()


def test_tags() -> None:
    assert torch.Tag.pointwise in torch_compat.tags_of(torch.ops.aten.sin.default)
    assert torch.Tag.nondeterministic_seeded in torch_compat.tags_of(torch.ops.aten.bernoulli.default)
    assert not torch_compat.tags_of(torch.sin)


# Canaries: torch says what the guards match, and the guards refuse.


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return 3 * gradient * x**2


def graph_nodes(tensor: Tensor) -> Iterator[torch.autograd.graph.Node]:
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(following for following, _ in node.next_functions)


def error_of(loss: Callable[[Tensor], Tensor], w: Tensor = W) -> str:
    """What torch says of differentiating twice."""
    w = w.clone().requires_grad_()
    with pytest.raises(RuntimeError) as raised:
        (gradient,) = torch.autograd.grad(loss(w), w, create_graph=True)
        torch.autograd.grad(gradient.square().sum(), w)
    return str(raised.value)


def hardsigmoid(w: Tensor) -> Tensor:
    return F.hardsigmoid(w.pow(3)).square().sum()


def checkpointed(w: Tensor) -> Tensor:
    return checkpoint(torch.sin, w * 2, use_reentrant=True).sum()


def sparse_embedding(w: Tensor) -> Tensor:
    w = w.view(3, 1)
    return w.square().sum() + F.embedding(torch.tensor([0, 2]), w, sparse=True).square().sum()


def compiled_part(w: Tensor) -> Tensor:
    return torch.compile(torch.sin, backend="aot_eager")(w).square().sum()


def once(w: Tensor) -> Tensor:
    return Once.apply(w).square().sum()


def scanned(w: Tensor) -> Tensor:
    from torch._higher_order_ops.scan import scan

    return scan(lambda a, x: ((b := a * x).clone(), b), w[0], w, dim=0)[1].square().sum()


def normalized(w: Tensor) -> Tensor:
    v = w.view(1, 3)
    return torch._weight_norm(v, v.detach()[:, :1].abs(), 0).sin().sum()


def attention(w: Tensor) -> Tensor:
    q = w.view(1, 1, 3, 1).repeat(1, 1, 1, 8).float()
    return F.scaled_dot_product_attention(q, q, q).square().sum()


def test_texts_of_missing_derivatives() -> None:
    match = torch_compat.NOT_DIFFERENTIABLE.search(error_of(hardsigmoid))
    assert match is not None and match[1] == "hardsigmoid_backward"
    w = W.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(once(w), w, create_graph=True)
    with pytest.raises(RuntimeError) as raised:
        gradient.sum().backward()
    match = torch_compat.NOT_DIFFERENTIABLE.search(str(raised.value))
    assert match is not None and match[2] == "once_differentiable"
    assert torch_compat.REENTRANT in error_of(checkpointed)
    assert torch_compat.SPARSE_AND_DENSE in error_of(sparse_embedding)
    assert torch_compat.COMPILED.search(error_of(compiled_part))


@pytest.mark.parametrize(
    ("loss", "remedy"),
    [
        (hardsigmoid, "hardsigmoid"),
        (checkpointed, "use_reentrant=False"),
        (sparse_embedding, "sparse=False"),
        (compiled_part, "hand the original module"),
        (once, "drop once_differentiable"),
        (scanned, "Python loop"),
        (normalized, "norm_except_dim"),
        (attention, "SDPBackend.MATH"),
    ],
)
def test_offending_graphs_are_refused(loss: Callable[[Tensor], Tensor], remedy: str) -> None:
    w = W.clone().requires_grad_()
    with pytest.raises(hvp.SecondDerivativeError, match=remedy):
        Tape(gradients(loss(w), [w], "loss"), [w], name="loss").product([W])


def test_names_of_nodes() -> None:
    w = W.clone().requires_grad_()
    assert torch_compat_nodes.WEIGHT_NORM_NODE in {node.name() for node in graph_nodes(normalized(w))}
    (gradient,) = torch.autograd.grad(Once.apply(w).sum(), w, create_graph=True)
    assert gradient.grad_fn is None or torch_compat_nodes.ERROR_NODE in {node.name() for node in graph_nodes(gradient)}
    (gradient,) = torch.autograd.grad(once(w), w, create_graph=True)
    assert torch_compat_nodes.ERROR_NODE in {node.name() for node in graph_nodes(gradient)}
    (gradient,) = torch.autograd.grad(attention(w), w, create_graph=True)
    assert torch_compat_nodes.NOT_IMPLEMENTED_NODES & {node.name() for node in graph_nodes(gradient)}
    x = torch.randn(3, 2, requires_grad=True)
    for norm, name in ((torch.nn.LayerNorm(2), "layer"), (torch.nn.BatchNorm1d(2), "batch")):
        (gradient,) = torch.autograd.grad(norm(x).sin().sum(), x, create_graph=True)
        found = {torch_compat_nodes.WRONG_WHEN_DIFFERENTIATED.get(node.name()) for node in graph_nodes(gradient)}
        assert f"{name} normalization" in found, "if torch has mended it, its formula can go"
    assert "Once" in {torch_compat_nodes.once_differentiable(node) for node in graph_nodes(once(w))}
    assert {torch_compat_nodes.once_differentiable(node) for node in graph_nodes(hardsigmoid(w))} == {None}
    modules = {torch_compat_nodes.control_flow(node) for node in graph_nodes(scanned(w))}
    assert modules - {None} == {"torch._higher_order_ops.scan"}
    assert {torch_compat_nodes.control_flow(node) for node in graph_nodes(once(w))} == {None}


def test_the_fused_weight_norm_has_a_wrong_second_derivative() -> None:
    """Once torch has mended it, the plain kernel can go."""
    v = torch.tensor([[0.5, -1.0, 2.0]], dtype=DTYPE, requires_grad=True)
    g = torch.tensor([[1.5]], dtype=DTYPE, requires_grad=True)
    assert torch.autograd.gradcheck(torch_compat.fused_weight_norm, (v, g))
    assert not torch.autograd.gradgradcheck(torch_compat.fused_weight_norm, (v, g), raise_exception=False)


@pytest.mark.skipif(sys.platform == "win32", reason="no symbols are looked up there")
def test_torch_loads_the_library_that_has_blas() -> None:
    path = Path(torch_compat.loaded_library("torch_cpu"))
    assert path.exists()
    assert hasattr(ctypes.CDLL(str(path)), "sgemm_") and hasattr(ctypes.CDLL(str(path)), "dgemm_")


def test_transforms_are_seen() -> None:
    """Of `torch.func`, and forward mode; not autograd."""
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        seen.append(torch_compat.in_transform())
        return x.square().sum()

    function(W.clone().requires_grad_()).backward()
    torch.func.vmap(function)(W[None])
    torch.func.grad(function)(W)
    torch.func.jvp(function, (W,), (W,))
    with torch.autograd.forward_ad.dual_level():
        function(W)
    function(W)
    assert seen == [False, True, True, True, True, False]


def test_hooks_around_steps_are_seen() -> None:
    optimizer = torch.optim.SGD([W.clone()], lr=0.1)
    assert not torch_compat.has_step_hooks(optimizer)
    register: list[Callable[..., Any]] = [
        optimizer.register_step_pre_hook,
        optimizer.register_step_post_hook,
        register_optimizer_step_pre_hook,
        register_optimizer_step_post_hook,
    ]
    for hook in register:
        handle = hook(lambda *_: None)
        assert torch_compat.has_step_hooks(optimizer)
        handle.remove()
    assert not torch_compat.has_step_hooks(optimizer)
