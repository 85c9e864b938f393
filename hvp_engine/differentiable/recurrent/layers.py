"""LSTM and GRU layers with the interface of torch's own, on the recurrences of this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hvp_engine._support.dtensor import is_sharded
from hvp_engine._support.torch_compat import in_transform, without_onednn
from hvp_engine.differentiable.recurrent import reference
from hvp_engine.differentiable.recurrent.operations import ops
from hvp_engine.differentiable.recurrent.signatures import DTYPES

_HALF = (torch.bfloat16, torch.float16)

Layer = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], list[int], bool], tuple[Tensor, tuple[Tensor, ...]]]
"""(data, parameters, states, batch sizes, reverse) -> output and last states."""


class _Call(NamedTuple):
    """What both ways of calling a layer of torch come to: packed sequences.

    Attributes:
        data: (N, inputs), the rows of all times; `batch_sizes` says how many each has.
        states: of an LSTM hidden and cell, of a GRU hidden, each (layers x directions, B, H).
        parameters: for each layer and direction the weights of input and state, then their biases if it is `biased`.
    """

    data: Tensor
    batch_sizes: list[int]
    states: Sequence[Tensor]
    parameters: Sequence[Tensor]
    biased: bool
    layers: int
    dropout: float
    train: bool
    bidirectional: bool

    @property
    def each(self) -> int:
        """Parameters of a layer and direction."""
        return 4 if self.biased else 2


def lstm(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    r"""As `torch.lstm`, which `torch.nn.LSTM` calls, with second derivatives: one operation a layer and direction.

    .. math::

        [i, f, g, o] = W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}, \quad
        c_t = \sigma(f)\, c_{t-1} + \sigma(i) \tanh(g), \quad h_t = \sigma(o) \tanh(c_t)

    Arguments:
        arguments: as torch's, by position: (input, (h0, c0), parameters, has_biases, num_layers, dropout, train,
            bidirectional, batch_first) with an input (T, B, I), or (data, batch_sizes, (h0, c0), parameters,
            has_biases, num_layers, dropout, train, bidirectional) for a packed one. States are (layers x directions, B,
            H). float32 and float64; bfloat16 and float16 are computed in float32.

    Returns (output, h_n, c_n).

    Cost: the matrix products of input and weight gradients are made once for the whole sequence, those of the state
    once for each time. A gradient keeps 8 numbers for each unit and time, and 3 more if it is to be differentiated. A
    Hessian-vector product is one pass forward in time and one back. Third derivatives are made from the plain formulas.

    What torch's layer does by itself it still does: projections (`proj_size`), autocast, sharded tensors and other
    devices than CPU and CUDA. Under `torch.func` (`vmap` too, which torch's layer refuses) and in forward mode it is
    the plain formulas.

    Errors: `ValueError` for batch sizes that grow and for an input of another size than the weights', `TypeError` for
    states of another form; for all else those of torch.

    Source: Hochreiter and Schmidhuber, Long short-term memory, Neural Computation, 1997; Pearlmutter, Fast exact
    multiplication by the Hessian, Neural Computation, 1994.

    >>> import torch
    >>> from hvp_engine.differentiable import lstm
    >>> rnn = torch.nn.LSTM(3, 2)
    >>> x, state = torch.ones(5, 1, 3), (torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
    >>> output, _, _ = lstm(x, state, rnn.all_weights[0], True, 1, 0.0, True, False, False)
    >>> torch.allclose(output, rnn(x)[0])
    True
    >>> (gradient,) = torch.autograd.grad(output.sum(), rnn.weight_hh_l0, create_graph=True)
    >>> torch.autograd.grad(gradient.square().sum(), rnn.weight_hh_l0)[0].shape
    torch.Size([8, 2])
    """
    return _called(torch.lstm, arguments, _lstm_layer)


def gru(*arguments: Any) -> tuple[Tensor, Tensor]:
    r"""As `torch.gru`, which `torch.nn.GRU` calls, with second derivatives: one operation a layer and direction.

    .. math::

        [r, z] = \sigma(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}), \quad
        n = \tanh(W_{in} x_t + b_{in} + r (W_{hn} h_{t-1} + b_{hn})), \quad h_t = (1 - z) n + z h_{t-1}

    Arguments:
        arguments: as those of :func:`lstm`, with h0 in place of (h0, c0).

    Returns (output, h_n).

    Cost, errors: as of :func:`lstm`; a gradient keeps 6 numbers for each unit and time, and 8 more if it is to be
    differentiated.

    Source: Cho et al., Learning phrase representations using RNN encoder-decoder, EMNLP 2014, as torch has it.

    >>> import torch
    >>> from hvp_engine.differentiable import gru
    >>> rnn = torch.nn.GRU(3, 2)
    >>> x = torch.ones(5, 1, 3)
    >>> output, _ = gru(x, torch.zeros(1, 1, 2), rnn.all_weights[0], True, 1, 0.0, True, False, False)
    >>> torch.allclose(output, rnn(x)[0])
    True
    """
    return _called(torch.gru, arguments, _gru_layer)


def _called(torchs: Callable[..., Any], arguments: tuple[Any, ...], layer: Layer) -> Any:
    """The layers, or what torch's own function makes of arguments that are left to it."""
    padded = len(arguments) == 9 and isinstance(arguments[3], bool)
    single = torchs is torch.gru
    if padded:
        input, states, *rest, batch_first = arguments
        input = input.transpose(0, 1) if batch_first else input
        fits = input.dim() == 3 and input.numel() > 0
        times = [input.shape[1]] * input.shape[0] if fits else []
        call = _Call(input, times, _states(states, single), *rest)
    elif len(arguments) == 9:
        data, batch_sizes, states, *rest = arguments
        call = _Call(data, batch_sizes.tolist(), _states(states, single), *rest)
        fits = data.dim() == 2 and data.numel() > 0
    else:
        fits = False
    if fits:
        _check_input(call.data, call.parameters)
        _check_states(call)
    if not fits or not _ours(call):
        with without_onednn():
            return torchs(*arguments)
    dtype = call.data.dtype
    if dtype in _HALF:
        call = call._replace(
            data=call.data.float(),
            states=[state.float() for state in call.states],
            parameters=[parameter.float() for parameter in call.parameters],
        )
    shape = call.data.shape
    output, *last = _stacked(call._replace(data=call.data.reshape(-1, shape[-1])), layer)
    if padded:
        output = output.reshape(*shape[:-1], output.shape[-1])
        output = output.transpose(0, 1) if batch_first else output
    results = output, *last
    return tuple(result.to(dtype) for result in results) if dtype in _HALF else results


def _states(given: Any, single: bool) -> Sequence[Tensor]:
    """A GRU's state, or both of an LSTM."""
    if isinstance(given, Tensor) if single else _is_pair(given):
        return [given] if single else given
    expected = "a tensor, h0" if single else "a pair of tensors, (h0, c0)"
    raise TypeError(f"states: expected {expected}; got {type(given).__name__}")


def _is_pair(given: Any) -> bool:
    return isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(part, Tensor) for part in given)


def _check_input(data: Tensor, parameters: Sequence[Tensor]) -> None:
    for first in parameters[:1]:
        if first.dim() == 2 and first.shape[1] != data.shape[-1]:
            raise ValueError(
                f"input: expected {first.shape[1]} numbers in the last dimension, as the weights of layer 0 "
                f"{tuple(first.shape)}; got shape {tuple(data.shape)}"
            )


def _check_states(call: _Call) -> None:
    count = call.layers * (2 if call.bidirectional else 1)
    for state in call.states:
        if state.dim() != 3 or len(state) != count:
            raise ValueError(
                f"states: expected shape ({count}, sequences, units), one for each layer and direction; got "
                f"{tuple(state.shape)}"
            )


def _ours(call: _Call) -> bool:
    """Whether the operations take these arguments."""
    tensors = [call.data, *call.states, *call.parameters]
    directions = 2 if call.bidirectional else 1
    return (
        len(call.parameters) == call.layers * directions * call.each
        and all(tensor.dtype == call.data.dtype and tensor.device == call.data.device for tensor in tensors)
        and call.data.dtype in (*DTYPES, *_HALF)
        and call.data.device.type in ("cpu", "cuda")
        and not any(is_sharded(tensor) for tensor in tensors)
        and not torch.is_autocast_enabled(call.data.device.type)
    )


def _stacked(call: _Call, layer: Layer) -> list[Tensor]:
    """Layer after layer; the output of both directions side by side, and the last states of all."""
    data, found = call.data, []
    directions = 2 if call.bidirectional else 1
    for number in range(call.layers):
        if number > 0 and call.dropout > 0:
            data = F.dropout(data, call.dropout, call.train)
        outputs = []
        for place in range(number * directions, (number + 1) * directions):
            parameters = call.parameters[place * call.each : (place + 1) * call.each]
            states = [state[place] for state in call.states]
            output, last = layer(data, parameters, states, call.batch_sizes, place % directions == 1)
            outputs.append(output)
            found.append(last)
        data = torch.cat(outputs, 1) if call.bidirectional else outputs[0]
    return [data, *(torch.stack(one) for one in zip(*found, strict=True))]


def _formulas_or_ops() -> Any:
    """Where the recurrences are: a transform does not see the derivatives of an operation."""
    return reference if in_transform() else ops


def _lstm_layer(
    data: Tensor, parameters: Sequence[Tensor], states: Sequence[Tensor], batch_sizes: list[int], reverse: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    of_input, of_state, *biases = parameters
    projected = F.linear(data, of_input, biases[0] + biases[1] if biases else None)
    recurrence = _formulas_or_ops().lstm_recurrence
    output, hidden, cell, *_ = recurrence(projected, of_state, *states, batch_sizes, reverse)
    return output, (hidden, cell)


def _gru_layer(
    data: Tensor, parameters: Sequence[Tensor], states: Sequence[Tensor], batch_sizes: list[int], reverse: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    of_input, of_state, *biases = parameters
    of_input_bias, of_state_bias = biases or (None, None)
    projected = F.linear(data, of_input, of_input_bias)
    recurrence = _formulas_or_ops().gru_recurrence
    output, hidden, *_ = recurrence(projected, of_state, of_state_bias, *states, batch_sizes, reverse)
    return output, (hidden,)
