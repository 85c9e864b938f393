"""What the package takes from torch's tracing and compiling; see `test_torch_compat.py`."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

import hvp_engine as hvp
from hvp_engine._support import torch_compat_traces
from hvp_engine.differentiation.abstract_tensor import abstract

DTYPE = torch.float64
W = torch.tensor([0.5, -1.0, 2.0], dtype=DTYPE)


def test_whether_the_compiler_is_imported() -> None:
    code = "import torch; from hvp_engine._support.torch_compat_traces import compiler_is_imported as imported\n"
    code += "assert not imported(); torch.compile(lambda x: x); assert imported()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_values_of_traces() -> None:
    def function(x: Tensor) -> list[Tensor]:
        values, places = x.sin().sort()
        return [values + 1, places]

    def noted_elsewhere() -> list[object]:
        with ThreadPoolExecutor() as pool:
            module = pool.submit(torch_compat_traces.make_fx(function), W).result()
        return [node.meta["val"] for node in module.graph.nodes if node.name == "sin"]

    with torch_compat_traces.traced_values(lambda tensor: ("noted", tensor.shape)):
        module = torch_compat_traces.make_fx(function)(W)
        elsewhere = noted_elsewhere()
    values = {node.name: node.meta["val"] for node in module.graph.nodes if "val" in node.meta}
    assert values["sin"] == values["add"] == ("noted", W.shape) and list(values["sort"]) == [("noted", W.shape)] * 2
    assert isinstance(elsewhere[0], FakeTensor), "another thread's trace"
    after = torch_compat_traces.make_fx(function)(W)
    assert all(isinstance(node.meta["val"], FakeTensor) for node in after.graph.nodes if node.name == "sin")
    torch.testing.assert_close(module(W), function(W))


def test_what_a_trace_computes_a_tensor_from() -> None:
    own, found = torch.arange(3), []

    def function(x: Tensor) -> Tensor:
        found.extend(map(torch_compat_traces.sources_of, (x, x.sin() * own, own, own + 1)))
        return x * (own + 1)

    torch_compat_traces.make_fx(function)(W[:3].clone())
    assert found[:2] == [None, None]
    assert [[one is own for one in sources] for sources in found[2:]] == [[True], [True]]
    assert torch_compat_traces.sources_of(own) == [own], "outside of a trace"


def test_compiled_graphs() -> None:
    compiled = torch_compat_traces.compile_graph(
        torch_compat_traces.make_fx(lambda x: (x.sin() + 1,))(W), [W], size_asserts=True
    )
    torch.testing.assert_close(compiled(W)[0], W.sin() + 1)


def test_code_of_a_graph_is_written_at_its_first_use() -> None:
    made = torch_compat_traces.make_fx(torch.sin)(W)
    module = torch_compat_traces.graph_module(torch.nn.Module(), made.graph)
    torch.testing.assert_close(module(W), W.sin())
    function = torch_compat_traces.function_of(torch_compat_traces.graph_module(torch.nn.Module(), made.graph))
    assert "lazy" not in function.__name__
    torch.testing.assert_close(function(W), W.sin())


def test_texts_of_traces() -> None:
    noted = partial(torch_compat_traces.traced_values, abstract)
    for loss in (lambda w: w * 2 if w.sum() > 0 else w, lambda w: w * w.sum().item()):
        with noted(), pytest.raises(RuntimeError) as raised:
            torch_compat_traces.make_fx(loss)(W)
        assert torch_compat_traces.says_data_dependent(raised.value)
    assert not torch_compat_traces.says_data_dependent(RuntimeError("shapes do not fit"))
    with pytest.raises(hvp.TraceError, match="control-flow|control flow"):
        hvp.HessianOperator(lambda w: (w**3).sum() * (1 if w.sum() > 0 else 2), W, engine="linearized") @ W
    assert isinstance(torch_compat_traces.make_fx(torch.sin)(W), fx.GraphModule)


def test_reverse_mode_inside_forward_mode_is_refused_in_a_trace() -> None:
    """Under make_fx it ends the process with a segmentation fault (jvp of grad, hessian under vmap)."""
    x, t = torch.randn(3, dtype=DTYPE), torch.ones(3, dtype=DTYPE)

    def by_jvp(w: Tensor) -> Tensor:
        return torch.func.jvp(torch.func.grad(lambda r: torch.tanh(r @ w)), (x,), (t,))[1].square().sum()

    def by_hessian(w: Tensor) -> Tensor:
        laplacian = torch.func.vmap(lambda r: torch.trace(torch.func.hessian(lambda s: torch.tanh(s @ w))(r)))
        return laplacian(torch.stack([x, t])).square().sum()

    def by_reverse(w: Tensor) -> Tensor:
        laplacian = torch.func.vmap(
            lambda r: torch.trace(torch.func.jacrev(torch.func.jacrev(lambda s: torch.tanh(s @ w)))(r))
        )
        return laplacian(torch.stack([x, t])).square().sum()

    for loss in (by_jvp, by_hessian):
        with pytest.raises(hvp.TraceError, match="torch.func.grad inside torch.func.jvp"):
            hvp.HessianOperator(loss, W, engine="linearized")
        products = [hvp.HessianOperator(loss, W, engine=engine) @ W for engine in ("eager", "auto")]
        torch.testing.assert_close(products[0], products[1])
    torch.testing.assert_close(
        hvp.HessianOperator(by_reverse, W, engine="linearized") @ W,
        hvp.HessianOperator(by_hessian, W, engine="eager") @ W,
    )


def test_operators_that_run_functions_are_told() -> None:
    from torch._higher_order_ops.scan import scan_op

    assert torch_compat_traces.is_higher_order(scan_op)
    assert not torch_compat_traces.is_higher_order(torch.ops.aten.sin.default)
