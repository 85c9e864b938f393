"""Operators without a second derivative in torch: formulas for them, and that none is missing from the list."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, randn, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

import hvp_engine as hvp
from hvp_engine.differentiation.differentiable_kernels import plain_kernels
from hvp_engine.differentiation.formulas import FORMULAS
from hvp_engine.differentiation.missing_derivatives import second_derivative_error

CLASSES = torch.tensor([0, 3, 1, 2, 2])
LABELS = torch.tensor([[0, 3, -1, 2], [-1, 0, 0, 0], [2, 1, 0, 3], [1, 1, -1, -1], [3, -1, 1, 1]])
WORDS = torch.tensor([1, 4, 4, 2, 0, 3, 1])
STARTS = torch.tensor([0, 2, 2, 5])  # one bag is empty
FROM_TO = torch.tensor([0, 3, 7])
X, Y, TABLE = randn(5, 4, seed=1), randn(6, 4, seed=2), randn(5, 3, seed=3)
SHARES = randn(7, seed=4)
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.1], dtype=DTYPE)


def bag(**options: Any) -> Callable[[Tensor], Tensor]:
    return lambda table: F.embedding_bag(WORDS, table, STARTS, **options)


def ctc(**options: Any) -> Callable[[Tensor], Tensor]:
    targets = torch.tensor([[1, 1, 2], [3, 0, 0], [2, 1, 2]])
    lengths = (torch.tensor([8, 5, 7]), torch.tensor([3, 1, 2]))
    return lambda x: F.ctc_loss(x.log_softmax(-1), targets, *lengths, **options)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


CASES: dict[str, tuple[Callable[..., Tensor], Sequence[Tensor]]] = {
    "hardsigmoid": (lambda x: F.hardsigmoid(4 * x), [X]),
    "hardsigmoid in place": (lambda x: F.hardsigmoid(4 * x, inplace=True), [X]),
    "hardsigmoid module": (lambda x: nn.Hardsigmoid()(3 * x), [X]),
    "cdist": (torch.cdist, [X, Y]),
    "cdist batched": (lambda x, y: torch.cdist(x.view(5, 2, 2), y.view(6, 1, 2, 2)), [X, Y]),
    "cdist p 1": (lambda x, y: torch.cdist(x, y, 1.0), [X, Y]),
    "cdist p 1.5": (lambda x, y: torch.cdist(x, y, p=1.5), [X, Y]),
    "cdist p 3": (lambda x, y: torch.cdist(x, y, p=3.0), [X, Y]),
    "cdist p inf": (lambda x, y: torch.cdist(x, y, p=float("inf")), [X, Y]),
    "cdist p 0": (lambda x, y: torch.cdist(x, y, p=0.0) * y.square().sum(), [X, Y]),
    "cdist of many": (lambda x, y: torch.cdist(torch.cat([x, x + 1, x + 2, x + 3, x + 4, x + 5]), y), [X, Y]),
    "cdist without mm": (lambda x, y: torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist"), [X, Y]),
    "pdist": (torch.pdist, [X]),
    "pdist p 3": (lambda x: F.pdist(x, 3.0), [X]),
    "pairwise module": (lambda x: F.pdist(x, p=1), [X]),
    "multi_margin": (lambda x: F.multi_margin_loss(x, CLASSES), [X]),
    "multi_margin p 2": (lambda x: F.multi_margin_loss(x, CLASSES, p=2, margin=0.7, weight=WEIGHTS), [X]),
    "multi_margin none": (lambda x: F.multi_margin_loss(x, CLASSES, p=2, reduction="none"), [X]),
    "multi_margin single": (lambda x: nn.MultiMarginLoss(p=2, reduction="sum")(x[0], CLASSES[1]), [X]),
    "multi_margin old": (lambda x: F.multi_margin_loss(x, CLASSES, 2, size_average=False), [X]),
    "multilabel_margin": (lambda x: F.multilabel_margin_loss(x.square(), LABELS), [X]),
    "multilabel_margin none": (lambda x: F.multilabel_margin_loss(x.square(), LABELS, reduction="none"), [X]),
    "multilabel_margin single": (lambda x: nn.MultiLabelMarginLoss()(x[0].square(), LABELS[0]), [X]),
    "bag mean": (bag(), [TABLE]),
    "bag sum": (bag(mode="sum"), [TABLE]),
    "bag max": (bag(mode="max"), [TABLE]),
    "bag padding": (bag(padding_idx=4), [TABLE]),
    "bag max padding": (bag(mode="max", padding_idx=-1), [TABLE]),
    "bag last offset": (
        lambda t: F.embedding_bag(WORDS, t, FROM_TO, include_last_offset=True),
        [TABLE],
    ),
    "bag matrix": (lambda t: F.embedding_bag(WORDS[:6].view(3, 2), t), [TABLE]),
    "bag matrix max": (lambda t: F.embedding_bag(WORDS[:6].view(3, 2), t, mode="max"), [TABLE]),
    "bag sparse": (bag(mode="sum", sparse=True), [TABLE]),
    "bag shares": (
        lambda t, s: F.embedding_bag(WORDS, t, STARTS, mode="sum", per_sample_weights=s),
        [TABLE, SHARES],
    ),
    "ctc": (ctc(), [randn(8, 3, 4, seed=5)]),
    "ctc sum": (ctc(reduction="sum", blank=4), [randn(8, 3, 5, seed=5)]),
    "ctc none": (ctc(reduction="none"), [randn(8, 3, 4, seed=6)]),
    "ctc single": (
        lambda x: nn.CTCLoss()(x.log_softmax(-1), torch.tensor([2, 2]), torch.tensor(6), torch.tensor(2)),
        [randn(6, 4, seed=7)],
    ),
    "ctc in a row": (
        lambda x: F.ctc_loss(x.log_softmax(-1), torch.tensor([1, 2, 3, 3, 1]), (7, 7), (2, 3)),
        [randn(7, 2, 4, seed=8)],
    ),
    "ctc impossible": (
        lambda x: F.ctc_loss(x.log_softmax(-1), torch.tensor([[1, 1, 1]]), (3,), (3,), zero_infinity=True) + x.sum(),
        [randn(3, 1, 4, seed=8)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_value_gradient_and_second_derivative(name: str) -> None:
    function, inputs = CASES[name]
    given, plain = ([tensor.clone().requires_grad_() for tensor in inputs] for _ in range(2))
    expected = function(*given)
    with plain_kernels():
        value = function(*plain)
        torch.testing.assert_close(value, expected)
        weight = randn(max(1, value.numel()), seed=9).view(value.shape)
        found = torch.autograd.grad((value * weight).sum(), plain)
    reference = torch.autograd.grad((expected * weight).sum(), given)
    for a, b in zip(found, reference, strict=True):
        torch.testing.assert_close(a, b.to_dense())

    def in_calls(*tensors: Tensor) -> Tensor:
        with plain_kernels():
            return function(*tensors).square()

    torch.autograd.gradgradcheck(in_calls, tuple(plain))


def test_equal_vectors_have_a_distance_of_zero_with_zero_derivatives() -> None:
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]], dtype=DTYPE, requires_grad=True)
    for p in (0.5, 1.0, 1.5, 2.0, 3.0):
        with plain_kernels():
            value = torch.pdist(x, p)
        assert value[0] == 0
        (gradient,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        assert torch.isfinite(gradient).all() and torch.isfinite(second).all()


def test_an_impossible_alignment_costs_infinity() -> None:
    arguments = randn(3, 1, 4, seed=8).log_softmax(-1), torch.tensor([[1, 1, 1]]), (3,), (3,)
    with plain_kernels():
        assert F.ctc_loss(*arguments).isinf() and F.ctc_loss(*arguments, zero_infinity=True) == 0


@pytest.mark.parametrize("engine", ["eager", "recorded", "linearized"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "cdist p 0"])
@pytest.mark.filterwarnings("ignore:.*a kernel in it has no second derivative")
def test_in_an_engine(name: str, engine: str) -> None:
    function, inputs = CASES[name]

    def loss(weights: list[Tensor]) -> Tensor:
        return function(*weights).square().sum() + sum(weight.pow(4).sum() for weight in weights)

    H = hvp.HessianOperator(loss, inputs, engine=engine)
    v = [randn(*tensor.shape, seed=10) for tensor in inputs]

    def gradient(step: float) -> Tensor:
        weights = [(w + step * t).requires_grad_() for w, t in zip(inputs, v, strict=True)]
        return flat([part.to_dense() for part in torch.autograd.grad(loss(weights), weights)])

    assert relative_error(flat(H @ v), (gradient(1e-5) - gradient(-1e-5)) / 2e-5) < 1e-5


class Block(nn.Module):
    """An inverted residual as in MobileNetV3: hardswish, and squeeze-and-excitation with hardsigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(2, 6, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.squeeze, self.excite = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.project = nn.Conv2d(6, 2, 1)
        self.activation, self.gate = nn.Hardswish(inplace=True), nn.Hardsigmoid(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.depthwise(self.activation(self.norm(self.expand(x)))))
        y = y * self.gate(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        return x + self.project(y)


@pytest.mark.parametrize(
    "engine", ["eager", "linearized", pytest.param("compiled", marks=pytest.mark.soak), "auto", "finite_difference"]
)
@pytest.mark.filterwarnings("ignore:.*a kernel in it has no second derivative")
def test_an_inverted_residual(engine: str) -> None:
    torch.manual_seed(0)
    block = Block().double()
    net, x = hvp.functional(block), randn(3, 2, 5, 5, seed=1)
    weights = {name: parameter.detach() for name, parameter in block.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return net(weights, x).square().mean() + sum(w.square().sum() for w in weights.values())

    v = {name: randn(*w.shape, seed=index) for index, (name, w) in enumerate(weights.items())}
    found = hvp.HessianOperator(loss, weights, engine=engine) @ v

    def gradient(step: float) -> Tensor:
        moved = {name: (w + step * v[name]).requires_grad_() for name, w in weights.items()}
        return flat(torch.autograd.grad(loss(moved), list(moved.values())))

    expected = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
    assert relative_error(flat(list(found.values())), expected) < 1e-5


@pytest.mark.parametrize("name", ["hardsigmoid", "cdist", "pdist", "bag sum", "multi_margin p 2", "ctc"])
def test_recorded_already_it_is_refused_by_name(name: str) -> None:
    function, inputs = CASES[name]
    weights = [tensor.clone().requires_grad_() for tensor in inputs]
    loss = function(*weights).square().sum()
    part = {"bag sum": "embedding_bag", "multi_margin p 2": "multi_margin_loss", "ctc": "ctc_loss"}.get(name, name)
    with pytest.raises(hvp.SecondDerivativeError, match=f"{part}.*remedy: hand over the loss as a function"):
        hvp.approx_inverse_hvp([torch.ones_like(w) for w in weights], loss, weights, 2, 0.01)


def test_a_segment_reduction_is_refused_by_name() -> None:
    def loss(w: Tensor) -> Tensor:
        return torch.segment_reduce(w, "sum", lengths=torch.tensor([2, 3])).square().sum()

    with pytest.raises(hvp.SecondDerivativeError, match="segment_reduce.*remedy: use Tensor.index_add"):
        hvp.HessianOperator(loss, X, engine="linearized")


# What has no second derivative in torch, by the formulas that torch is generated from

REFUSED = {
    "segment_reduce": "index_add",
    "_sparse_log_softmax": "to_dense",
    "_sparse_softmax": "to_dense",
    "_sparse_mm_reduce_impl": "to_dense",
    "_sparse_sum": "to_dense",
    "mkldnn_linear": "to_dense",
    "mkldnn_adaptive_avg_pool2d": "to_dense",
    "mkldnn_max_pool2d": "to_dense",
    "mkldnn_max_pool3d": "to_dense",
    "_fake_quantize_learnable_per_tensor_affine": "not learned",
    "_fake_quantize_learnable_per_channel_affine": "not learned",
    "_standard_gamma": "without a derivative",
    "_scaled_dot_product_flash_attention": "SDPBackend.MATH",
    "_scaled_dot_product_efficient_attention": "SDPBackend.MATH",
    "_cudnn_rnn": "cudnn.flags",
}
"""Operators that are refused, and a part of what the message says to use."""

BY_FORMULA = {
    "hardsigmoid",
    "_cdist_forward",
    "_pdist_forward",
    "multi_margin_loss",
    "multilabel_margin_loss_forward",
    "_embedding_bag",
    "_ctc_loss",
    "_weight_norm_interface",
}
ON_PLAIN_KERNELS = re.compile(r"attention|_cudnn_rnn|mkldnn_rnn_layer|cudnn_affine_grid|miopen|mps")
DIFFERENTIABLE = {
    # In grad mode their backward is made of differentiable operators, or their second derivative is of no use.
    *("native_group_norm", "_fused_rms_norm", "_thnn_fused_gru_cell", "logit", "matmul", "linear", "glu_backward"),
    *("select", "sum", "_masked_softmax"),  # nested tensors; inference
}


def without_second_derivative() -> set[str]:
    """Operators whose derivative is a kernel without a derivative."""
    yaml, torchgen = pytest.importorskip("yaml"), pytest.importorskip("torchgen")
    packaged = Path(torchgen.__file__).parent / "packaged"
    derivatives = yaml.safe_load((packaged / "autograd/derivatives.yaml").read_text())
    functions = yaml.safe_load((packaged / "ATen/native/native_functions.yaml").read_text())
    names = {function["func"].split("(")[0].split(".")[0]: function for function in functions}
    composite = {
        name
        for name, function in names.items()
        if "CompositeImplicitAutograd" in str(function.get("dispatch"))
        or not (function.get("dispatch") or function.get("structured_delegate"))
    }
    formulas: dict[str, str] = {}
    for entry in derivatives:
        text = " ".join(str(value) for key, value in entry.items() if key != "name")
        name = entry["name"].split("(")[0].split(".")[0]
        formulas[name] = formulas.get(name, "") + text
    closed = {name for name, text in formulas.items() if f'not_implemented("{name}"' in text}
    missing = {name for name in names if name not in formulas and name not in composite} | closed
    return {
        name
        for name, text in formulas.items()
        if any(re.search(rf"\b{kernel}(_symint)?\(", text) for kernel in missing if "backward" in kernel)
        and name not in closed
    }


def test_every_operator_without_a_second_derivative_has_a_formula_or_a_remedy() -> None:
    found = {name for name in without_second_derivative() if not ON_PLAIN_KERNELS.search(name)} - DIFFERENTIABLE
    assert found - BY_FORMULA - REFUSED.keys() == set()
    assert found >= BY_FORMULA
    assert len(FORMULAS) + 1 == len(BY_FORMULA)  # and the weight normalization


@pytest.mark.parametrize("operator", REFUSED)
def test_what_is_refused_has_a_remedy(operator: str) -> None:
    assert REFUSED[operator] in str(second_derivative_error(f"{operator}_backward")).split("remedy:")[1]
