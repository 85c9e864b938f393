"""What the package takes from torch's tracing and compiling; see `test_torch_compat.py`."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hvp_engine._support import torch_compat_traces
from hvp_engine.differentiation.trace.graph_recorder import record_graph

DTYPE = torch.float64
W = torch.tensor([0.5, -1.0, 2.0], dtype=DTYPE)


def test_whether_the_compiler_is_imported() -> None:
    code = "import torch; from hvp_engine._support.torch_compat_traces import compiler_is_imported as imported\n"
    code += "assert not imported(); torch.compile(lambda x: x); assert imported()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_compiled_graphs() -> None:
    compiled = torch_compat_traces.compile_graph(record_graph(lambda x: (x.sin() + 1,), [W]), [W], size_asserts=True)
    torch.testing.assert_close(compiled(W)[0], W.sin() + 1)


def test_the_derivative_of_log_softmax_is_laid_out_otherwise_than_fake_tensors_say() -> None:
    """If this fails, a copy in `compile_graph` is needed no more."""
    grad, output = W.expand(2, 4, 3).contiguous().transpose(0, 1), W.expand(4, 2, 3).contiguous()
    operation = torch_compat_traces.LAID_OUT_OTHERWISE
    with FakeTensorMode() as mode:
        fake = operation(mode.from_tensor(grad), mode.from_tensor(output), 2, DTYPE)
    assert operation(grad, output, 2, DTYPE).is_contiguous() and not fake.is_contiguous()


def test_code_of_a_graph_is_written_at_its_first_use() -> None:
    made = record_graph(torch.sin, [W])
    module = torch_compat_traces.graph_module(torch.nn.Module(), made.graph)
    torch.testing.assert_close(module(W), W.sin())
    function = torch_compat_traces.function_of(torch_compat_traces.graph_module(torch.nn.Module(), made.graph))
    assert "lazy" not in function.__name__
    torch.testing.assert_close(function(W), W.sin())


def test_operators_that_run_functions_are_told() -> None:
    from torch._higher_order_ops.scan import scan_op

    assert torch_compat_traces.is_higher_order(scan_op)
    assert not torch_compat_traces.is_higher_order(torch.ops.aten.sin.default)


def test_operators_that_autograd_replaces() -> None:
    aten = torch.ops.aten
    assert all(map(torch_compat_traces.is_composite, (aten.matmul.default, aten.reshape.default)))
    plain = aten.mm.default, aten.view.default, aten.silu_backward.default
    assert not any(map(torch_compat_traces.is_composite, plain))


def test_classes_of_tensors_with_a_dispatch_of_their_own() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    class Named(torch.Tensor):
        pass

    own = torch_compat_traces.has_own_dispatch
    assert own(TwoTensor) and not any(map(own, (torch.Tensor, torch.nn.Parameter, Named, torch.nn.Buffer)))


def test_decompositions_do_the_same() -> None:
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    found = torch_compat_traces.decomposition(torch.ops.aten.huber_loss_backward.default)
    assert found is not None and torch_compat_traces.decomposition(torch.ops.aten.mm.default) is None
    arguments = (torch.tensor(0.7), x, y, 1, 0.5)
    torch.testing.assert_close(found(*arguments), torch.ops.aten.huber_loss_backward.default(*arguments))


def test_compiled_code_is_discarded() -> None:
    """Also of a block that is the first to import torch.compile."""
    code = """
import torch
from hvp_engine._support.torch_compat_traces import compiled_code_discarded, compiler_is_imported

made = []

def backend(module, inputs):
    made.append(module)
    return module.forward

with compiled_code_discarded():
    assert not compiler_is_imported()
    first = torch.compile(lambda x: x.sin() + 1, backend=backend)
    first(torch.ones(3))
assert len(made) == 1 and compiler_is_imported()
first(torch.ones(3))
assert len(made) == 2, "compiled anew"
second = torch.compile(lambda x: x.cos() + 1, backend=backend)
with compiled_code_discarded():
    second(torch.ones(3))
assert len(made) == 2, "not compiled in the block"
second(torch.ones(3))
assert len(made) == 3
"""
    subprocess.run([sys.executable, "-c", code], check=True)
