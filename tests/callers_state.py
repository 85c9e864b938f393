"""A caller with much state that our calls could disturb, and a snapshot of it."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hvp_engine as hvp
from hvp_engine.ops import backend

DTYPE = torch.float64


class Caller:
    """BatchNorm, dropout, a frozen parameter, hooks, gradients and an optimizer's state that were there before; losses
    that draw from every global generator.

    Attributes:
        traced: whether losses draw by torch alone, as those that are traced have to.
        fails_at: the evaluation of a loss from which on it raises `KeyError`; None for none. An engine may try again
            what failed in a trace.
        cleanup: what is to be closed afterwards.
    """

    def __init__(self) -> None:
        torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
        layers = [nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 2)]
        self.module = nn.Sequential(*layers).to(DTYPE)
        self.module[0].bias.requires_grad_(False)
        self.module[3].register_forward_hook(lambda *_: None)
        self.net = hvp.functional(self.module)
        self.hyper = torch.zeros(3, dtype=DTYPE, requires_grad=True)
        self.x, self.y = torch.randn(7, 3, dtype=DTYPE), torch.arange(7) % 2
        self.trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam([*self.trained, self.hyper])
        for tensor in (*self.trained, self.hyper):
            tensor.grad = torch.ones_like(tensor)
        self.optimizer.step()
        self.traced = False
        self.fails_at: int | None = None
        self.evaluations = 0
        self.cleanup = contextlib.ExitStack()

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def like_weights(self) -> dict[str, Tensor]:
        return {name: torch.ones_like(weight) for name, weight in self.weights.items()}

    def counted(self) -> None:
        """Count an evaluation of a loss."""
        self.evaluations += 1
        if self.fails_at is not None and self.evaluations >= self.fails_at:
            raise KeyError("from the loss")

    def train_loss(self, weights: dict[str, Tensor], hyper: Tensor, batch: Tensor) -> Tensor:
        self.counted()
        drawn = torch.rand((), dtype=DTYPE)
        if not self.traced:
            drawn = drawn + 0 * random.random() + 0 * numpy.random.rand()
        decay = sum(weight.square().sum() for weight in weights.values())
        return cross_entropy(self.net(weights, batch * hyper.exp()), self.y) + decay + drawn

    def val_loss(self, weights: dict[str, Tensor], hyper: Tensor, batch: Tensor) -> Tensor:
        self.counted()
        return cross_entropy(self.net(weights, batch), self.y) + torch.rand((), dtype=DTYPE)

    def loss_of_weights(self, weights: dict[str, Tensor], batch: Tensor) -> Tensor:
        return self.train_loss(weights, self.hyper.detach(), batch)

    def snapshot(self) -> dict[str, Any]:
        """All of the caller's state, by name."""
        parameters, buffers = dict(self.module.named_parameters()), dict(self.module.named_buffers())
        tensors = {**parameters, **buffers, "hyper": self.hyper, "x": self.x, "y": self.y}
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_parameters")
        return {
            "weights": [p.detach().clone() for p in parameters.values()],
            "weights' versions": [p._version for p in parameters.values()],
            "hyper": self.hyper.detach().clone(),
            "batch": [self.x.clone(), self.y.clone()],
            "buffers": [buffer.clone() for buffer in buffers.values()],
            "gradients": [None if t.grad is None else (id(t.grad), t.grad.clone()) for t in tensors.values()],
            "tensors": [(name, id(t), t.data_ptr(), t.requires_grad, t.grad_fn) for name, t in tensors.items()],
            "training flags": [part.training for part in self.module.modules()],
            "hooks": [{name: list(getattr(part, name)) for name in hooks} for part in self.module.modules()],
            "tensor hooks": [t._backward_hooks for t in tensors.values()],
            "attributes": [sorted(vars(part)) for part in self.module.modules()],
            "optimizer": [list(s.values()) for s in self.optimizer.state_dict()["state"].values()],
            "random numbers": [torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())],
            **settings(),
        }


def settings() -> dict[str, Any]:
    """Settings of the whole process or thread."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.is_autocast_cache_enabled(),
        ),
        "cuDNN": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "attention": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        "attention by cuDNN": cuda.cudnn_sdp_enabled(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "float32 precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "saved-tensor hooks": torch._C._autograd._saved_tensors_hooks_is_enabled(),
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "tracing": torch._guards.TracingContext.try_get(),
        "exception hooks": (sys.excepthook, threading.excepthook),
        "signal handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "warnings": list(warnings.filters),
        "collector": gc.isenabled(),
        "recursion limit": sys.getrecursionlimit(),
        "environment": dict(os.environ),
        "backend": backend.CHOICE.get(),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """The names of what has changed."""
    return {name for name, value in before.items() if not _equal(value, after[name])}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


@contextlib.contextmanager
def unusual_settings() -> Iterator[None]:
    """Every setting differs from its default, so resetting it instead of restoring it is noticed."""
    before = settings()
    sys.excepthook = lambda *_: None
    signal.signal(signal.SIGTERM, lambda *_: None)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_default_dtype(DTYPE)
    torch.set_num_threads(3)
    torch._C._set_mkldnn_enabled(False)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_math_sdp(True)
    try:
        with (
            torch.no_grad(),
            torch.backends.cudnn.flags(enabled=False, benchmark=True),
            torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
            hvp.use_backend("reference"),
        ):
            yield
    finally:
        sys.excepthook = before["exception hooks"][0]
        signal.signal(signal.SIGTERM, before["signal handlers"][signal.SIGTERM])
        torch.use_deterministic_algorithms(before["deterministic"][0], warn_only=before["deterministic"][1])
        torch.set_default_dtype(before["default dtype"])
        torch.set_num_threads(before["threads"])
        torch._C._set_mkldnn_enabled(before["mkldnn"])
        torch.backends.cuda.enable_flash_sdp(before["attention"][0])
