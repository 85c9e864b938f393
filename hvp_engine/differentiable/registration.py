"""How operations with two derivatives are registered: schema, shapes without values, kernels and autograd."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import INPUT_DTYPES
from hvp_engine._support.precision import without_autocast
from hvp_engine._support.torch_compat import without_torch_functions
from hvp_engine.ops.backend import fastest, select

Fields = TypeVar("Fields", bound=NamedTuple)

LIBRARY = torch.library.Library("hvp_engine", "FRAGMENT")


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Make `torch.ops.hvp_engine.<name>` of `schema`.

    Arguments:
        run: the operation, on a CPU and on CUDA. It keeps to the dtypes of its arguments: an autocast that is on where
            one level is computed may be off at the next, and all have to compute the same.
        fake: results of the right shapes, dtypes and strides, without values.
        setup, backward: as `torch.library.register_autograd` takes them; see :func:`keep`.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, partial(_in_its_dtypes, run), device)
    torch.library.register_fake(f"hvp_engine::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"hvp_engine::{name}", backward, setup_context=setup, lib=LIBRARY)
    torch.library.register_vmap(f"hvp_engine::{name}", partial(_one_by_one, name), lib=LIBRARY)


def register_levels(reference: Callable[..., Any], *levels: tuple[str, Callable[..., Any], Callable[..., Any]]) -> None:
    """Make operations of (schema, run, fake) of which each is the derivative of the one before; those of the last one
    are `reference`'s."""
    for (schema, run, fake), (derivative, *_) in pairwise(levels):
        register(schema, run, fake, *by_operation(schema, derivative))
    register(*levels[-1], *by_reference(reference))


def _in_its_dtypes(run: Callable[..., Any], *arguments: Any) -> Any:
    with _its_dtypes(arguments):
        return run(*arguments)


def _its_dtypes(arguments: Sequence[Any]) -> AbstractContextManager[object]:
    return without_autocast(next(x.device for x in arguments if isinstance(x, Tensor)))


def _one_by_one(name: str, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """The operation on each of a batch of arguments."""
    operation = getattr(torch.ops.hvp_engine, name)
    results = [
        operation(*(a.select(d, index) if isinstance(d, int) else a for a, d in zip(arguments, in_dims, strict=True)))
        for index in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def keep(ctx: Any, values: Sequence[Any]) -> None:
    """Keep what a backward needs where a recorder of products finds it: tensors, and in `ctx.settings` the rest."""
    ctx.set_materialize_grads(False)
    saved = [value for value in values if isinstance(value, Tensor)]
    settings = ["" if isinstance(value, Tensor) else value for value in values]
    ctx.settings = tuple([tuple(value) if isinstance(value, list) else value for value in settings])
    ctx.save_for_backward(*saved)


def kept(ctx: Any) -> list[Any]:
    """What :func:`keep` was given."""
    saved = iter(ctx.saved_tensors)
    return [next(saved) if value == "" else value for value in ctx.settings]


class Signature(NamedTuple):
    """Names of what an operation takes and gives; `tensors` are the arguments that cannot be None."""

    name: str
    arguments: tuple[str, ...]
    tensors: frozenset[str]
    results: tuple[str, ...]

    @classmethod
    def of(cls, schema: str) -> Signature:
        name, _, sides = schema.partition("(")
        arguments, results = ([one.split() for one in side.strip("()").split(", ")] for side in sides.split(" -> "))
        tensors = frozenset(words[1] for words in arguments if words[0] == "Tensor")
        return cls(name, tuple(words[1] for words in arguments), tensors, tuple(words[-1] for words in results))


def by_operation(schema: str, derivative: str) -> tuple[Callable[..., None], Callable[..., Any]]:
    """`setup` and `backward` of an operation whose derivative is another one, given both schemas.

    The derivative begins with the gradients of the first results; what it takes beside them has the names of arguments
    and results, which are kept. Its results are named after the arguments that they are for:

        f(Tensor x, float a) -> (Tensor y, Tensor z)
        f_backward(Tensor grad, Tensor x, Tensor z, float a) -> (Tensor for_x)
    """
    this, other = Signature.of(schema), Signature.of(derivative)
    names = {*this.arguments, *this.results}
    gradients = [name for name in other.arguments if name not in names]
    taken = other.arguments[len(gradients) :]
    answers = [name.removeprefix("for_") for name in other.results]
    described = [name for name in answers if name not in taken]
    known = (*taken, *described)
    places = [(*this.arguments, *this.results).index(name) for name in known]
    routes = [(answers.index(name), known.index(name)) if name in answers else None for name in this.arguments]
    filled = [
        known.index(result.removeprefix("for_")) if name in other.tensors and len(gradients) > 1 else None
        for name, result in zip(gradients, this.results, strict=False)
    ]

    def setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        outputs = (output,) if isinstance(output, Tensor) else output
        if constant := outputs[len(gradients) :]:
            ctx.mark_non_differentiable(*constant)
        values = (*inputs, *outputs)
        kinds = [None if (x := values[place]) is None else (tuple(x.shape), x.dtype) for place in places[len(taken) :]]
        keep(ctx, [values[place] for place in places[: len(taken)]] + kinds)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = grads[: len(gradients)]
        if all(gradient is None for gradient in given):
            return (None,) * len(routes)
        values = kept(ctx)  # which checkpointing computes again, with whatever functions are replaced
        with without_torch_functions():
            tangents = [
                torch.zeros_like(values[like]) if gradient is None and like is not None else gradient
                for gradient, like in zip(given, filled, strict=True)
            ]
            found = getattr(torch.ops.hvp_engine, other.name)(*tangents, *values[: len(taken)])
            results = (found,) if isinstance(found, Tensor) else found
            return tuple([None if route is None else _like(results[route[0]], values[route[1]]) for route in routes])

    return setup, backward


def _like(gradient: Tensor, argument: Any) -> Tensor | None:
    """With the shape and dtype of the argument that it is for."""
    if argument is None:
        return None
    shape, dtype = (argument.shape, argument.dtype) if isinstance(argument, Tensor) else argument
    gradient = gradient if gradient.shape == shape else gradient.view(shape)
    return gradient if gradient.dtype == dtype else gradient.to(dtype)  # torch takes 6 us to do nothing


def by_reference(reference: Callable[..., Any]) -> tuple[Callable[..., None], Callable[..., Any]]:
    """`setup` and `backward` of an operation that has a reference in plain torch, whose derivatives are torch's.

    So derivatives of an order for which there is no kernel exist all the same.
    """

    def setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        keep(ctx, inputs)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        arguments = kept(ctx)
        with without_torch_functions(), _its_dtypes(arguments):
            return derivatives(reference, arguments, ctx.needs_input_grad, grads)

    return setup, backward


def derivatives(
    reference: Callable[..., Any], arguments: Sequence[Any], wanted: Sequence[bool], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The derivatives of a reference in plain torch for each argument that is wanted, from gradients of its results: by
    autograd, with a graph if grad mode is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():  # one argument may depend on another: the derivatives are partial
        taken = [x.view_as(x) if isinstance(x, Tensor) else x for x in arguments]
        found = reference(*taken)
        outputs: Sequence[Tensor] = found if isinstance(found, tuple) else (found,)
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
        active = [x for x, needed in zip(taken, wanted, strict=True) if needed]
        by_autograd: Sequence[Tensor | None] = [None] * len(active)
        if pairs and active:
            results, gradients = zip(*pairs, strict=True)
            by_autograd = torch.autograd.grad(results, active, gradients, create_graph=create_graph, allow_unused=True)
    each = iter(by_autograd)
    return tuple(next(each) if needed else None for needed in wanted)


def split_off(kind: type[Fields], arguments: Sequence[Any]) -> tuple[Sequence[Any], Fields]:
    """The arguments, and the last of them as the named tuple that they make up."""
    count = len(arguments) - len(kind._fields)
    return arguments[:count], kind._make(arguments[count:])


def check_tensor(value: Any, name: str) -> None:
    """`TypeError` for an argument that is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor; got {type(value).__name__}")


def autocasts(device: torch.device) -> bool:
    """Whether an autocast is on."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def autocast(*tensors: Tensor | None) -> list[Any]:
    """Floating tensors in the dtype of an autocast that is on for the first one's device, but for float64, as torch's
    own functions cast."""
    device = tensors[0].device  # type: ignore[union-attr]
    if not autocasts(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device.type)
    return [x.to(dtype) if x is not None and x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors]


def check_dtype(input: Tensor) -> None:
    """`TypeError` for a dtype that no kernel takes."""
    if input.dtype not in INPUT_DTYPES:
        raise TypeError(f"input: expected float32, float64, bfloat16 or float16; got {input.dtype}")


def backend_among(device: torch.device, names: Sequence[str]) -> str:
    """The backend that runs on `device`, of those named; the fastest of them where `use_backend` names none of them."""
    name, _ = select(device, among=tuple(names))
    return name if name in names else fastest(device.type, tuple(names))


def implementation(device: torch.device, modules: Mapping[str, str]) -> Any:
    """The module that computes on `device`, of those given by backend."""
    return _module(modules[backend_among(device, tuple(modules))])


_module = cache(importlib.import_module)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of `dtype` are computed and added up."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
