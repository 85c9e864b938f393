"""What the recurrences of LSTM and GRU and their derivatives compute, in plain torch.

A recurrence is what remains of a layer when the matrix products over the whole sequence are made outside: it starts
from `projected` = x W_ih^T + b. Sequences are packed, as in :class:`torch.nn.utils.rnn.PackedSequence`: time t has
`batch_sizes[t]` rows, which do not become more, and N = sum(batch_sizes) is the number of rows of everything that has a
value at each time. B = batch_sizes[0] is the number of sequences, H that of units.

Each recurrence is a function of three levels, written out here. Its backward is linear in the gradients that it takes,
and a function of what the forward has kept; the backward of that one gives gradients for both. So a product with the
Hessian is one pass forward in time, `*_double_backward`, and one pass back, `*_backward` again, into which everything
that the first one found flows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


def _times(batch_sizes: Sequence[int], reverse: bool) -> Iterator[slice]:
    """The rows of each time, in the order in which the recurrence goes: of sizes 2, 2, 1 the rows are 0:2, 2:4, 4:5."""
    ends = torch.tensor(batch_sizes).cumsum(0).tolist()
    rows = [slice(end - size, end) for end, size in zip(ends, batch_sizes, strict=True)]
    return reversed(rows) if reverse else iter(rows)


def _rows_or_zeros(gradient: Tensor | None) -> Callable[[slice], Tensor | float]:
    return lambda rows: 0.0 if gradient is None else gradient[rows]


def lstm_recurrence(
    projected: Tensor, weight: Tensor, hidden: Tensor, cell: Tensor, batch_sizes: Sequence[int], reverse: bool
) -> tuple[Tensor, ...]:
    """The recurrence of an LSTM, with (i, f, g, o) the quarters of the gates:

        gates_t = (sigmoid, sigmoid, tanh, sigmoid)(projected_t + h_{t-1} weight^T)
        c_t = f c_{t-1} + i g,   h_t = o tanh(c_t)

    Arguments:
        projected: (N, 4H).
        weight: (4H, H), which multiplies the state.
        hidden, cell: (B, H), the initial state.
        batch_sizes, reverse: of the sequences, and whether they are read from their ends.

    Returns `output` (N, H), which is h_t, the last states `last_hidden` and `last_cell` (B, H), and what the backward
    takes: `previous` (N, H), which is h_{t-1}, `gates` (N, 4H), `previous_cell` (N, H), which is c_{t-1}, and
    `squashed` (N, H), which is tanh(c_t).
    """
    size = hidden.shape[1]
    output, previous, previous_cell, squashed = (projected.new_empty(len(projected), size) for _ in range(4))
    gates = torch.empty_like(projected, memory_format=torch.contiguous_format)
    hidden, cell = hidden.clone(), cell.clone()
    for rows in _times(batch_sizes, reverse):
        count = rows.stop - rows.start
        previous[rows], previous_cell[rows] = hidden[:count], cell[:count]
        i, f, g, o = (projected[rows] + hidden[:count] @ weight.t()).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        gates[rows] = torch.cat([i, f, g, o], 1)
        cell[:count] = f * cell[:count] + i * g
        squashed[rows] = cell[:count].tanh()
        output[rows] = hidden[:count] = o * squashed[rows]
    return output, hidden, cell, previous, gates, previous_cell, squashed


def lstm_recurrence_backward(
    output_grad: Tensor | None,
    last_hidden_grad: Tensor | None,
    last_cell_grad: Tensor | None,
    previous_grad: Tensor | None,
    gates_grad: Tensor | None,
    previous_cell_grad: Tensor | None,
    squashed_grad: Tensor | None,
    weight: Tensor,
    gates: Tensor,
    previous_cell: Tensor,
    squashed: Tensor,
    batch_sizes: Sequence[int],
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    """The gradients of :func:`lstm_recurrence`, from those of its results; a gradient that is None is zero.

    Returns `projected_grad` (N, 4H), `hidden_grad` and `cell_grad` (B, H); that of `weight` is projected_grad^T
    previous. With `keep` there follows what the double backward takes, else nothing in two tensors of no rows: the
    gradients of h_t and of c_t (N, H), with what comes from later times.
    """
    size = weight.shape[1]
    projected_grad = torch.empty_like(gates, memory_format=torch.contiguous_format)
    hidden_grads, cell_grads = (gates.new_empty(len(gates) if keep else 0, size) for _ in range(2))
    hidden, cell = (
        gates.new_zeros(batch_sizes[0], size) if gradient is None else gradient.clone()
        for gradient in (last_hidden_grad, last_cell_grad)
    )
    of_output, of_previous, of_cell, of_squashed = map(
        _rows_or_zeros, (output_grad, previous_grad, previous_cell_grad, squashed_grad)
    )
    for rows in _times(batch_sizes, not reverse):
        count = rows.stop - rows.start
        i, f, g, o = gates[rows].chunk(4, 1)
        s = squashed[rows]
        dh = hidden[:count] + of_output(rows)
        dc = cell[:count] + (dh * o + of_squashed(rows)) * (1 - s * s)
        di, df, dg, do = dc * g, dc * previous_cell[rows], dc * i, dh * s
        if gates_grad is not None:
            di, df, dg, do = (x + y for x, y in zip((di, df, dg, do), gates_grad[rows].chunk(4, 1), strict=True))
        projected_grad[rows] = torch.cat([di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do * o * (1 - o)], 1)
        hidden[:count] = projected_grad[rows] @ weight + of_previous(rows)
        cell[:count] = dc * f + of_cell(rows)
        if keep:
            hidden_grads[rows], cell_grads[rows] = dh, dc
    return projected_grad, hidden, cell, hidden_grads, cell_grads


def lstm_recurrence_double_backward(
    projected_cotangent: Tensor,
    hidden_cotangent: Tensor,
    cell_cotangent: Tensor,
    weight: Tensor,
    gates: Tensor,
    previous_cell: Tensor,
    squashed: Tensor,
    hidden_grads: Tensor,
    cell_grads: Tensor,
    batch_sizes: Sequence[int],
    reverse: bool,
) -> tuple[Tensor, ...]:
    """The gradients of :func:`lstm_recurrence_backward`, from those of its first three results; in the last four
    arguments it takes what that one was given by the forward, and kept.

    Returns the gradients for `output_grad` (N, H), `last_hidden_grad`, `last_cell_grad` (B, H), `previous_grad` (N, H),
    `gates` (N, 4H), `previous_cell` and `squashed` (N, H); that for `weight` is projected_grad^T times the fourth.
    """
    size = weight.shape[1]
    output, previous, cells, squashes = (gates.new_empty(len(gates), size) for _ in range(4))
    sources = torch.empty_like(gates, memory_format=torch.contiguous_format)
    hidden, cell = hidden_cotangent.clone(), cell_cotangent.clone()
    for rows in _times(batch_sizes, reverse):
        count = rows.stop - rows.start
        i, f, g, o = gates[rows].chunk(4, 1)
        s, before, dh, dc = squashed[rows], previous_cell[rows], hidden_grads[rows], cell_grads[rows]
        previous[rows], old = hidden[:count], cell[:count].clone()
        ai, af, ag, ao = (projected_cotangent[rows] + hidden[:count] @ weight.t()).chunk(4, 1)
        ui, uf, ug, uo = ai * i * (1 - i), af * f * (1 - f), ag * (1 - g * g), ao * o * (1 - o)
        cell[:count] = ui * g + uf * before + ug * i + old * f
        u = cell[:count] * (1 - s * s)
        output[rows] = hidden[:count] = uo * s + u * o
        sources[rows] = torch.cat(
            [
                dc * (ai * g * (1 - 2 * i) + ug),
                dc * (af * before * (1 - 2 * f) + old),
                dc * (ui - 2 * ag * i * g),
                dh * (ao * s * (1 - 2 * o) + u),
            ],
            1,
        )
        cells[rows] = uf * dc
        squashes[rows] = dh * (uo - 2 * cell[:count] * o * s)
    return output, hidden, cell, previous, sources, cells, squashes


def gru_recurrence(
    projected: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    batch_sizes: Sequence[int],
    reverse: bool,
) -> tuple[Tensor, ...]:
    """The recurrence of a GRU, with (r, z, n) the thirds of `projected` and of m_t = h_{t-1} weight^T + bias:

        r = sigmoid(projected_r + m_r),   z = sigmoid(projected_z + m_z),   n = tanh(projected_n + r m_n)
        h_t = (1 - z) n + z h_{t-1}

    Arguments:
        projected: (N, 3H).
        weight: (3H, H), which multiplies the state; `bias` (3H) or None.
        hidden: (B, H), the initial state.
        batch_sizes, reverse: of the sequences, and whether they are read from their ends.

    Returns `output` (N, H), which is h_t, the last state `last_hidden` (B, H), and what the backward takes: `previous`
    (N, H), which is h_{t-1}, and `gates` (N, 4H), which is r, z, n and m_n.
    """
    size = hidden.shape[1]
    output, previous = (projected.new_empty(len(projected), size) for _ in range(2))
    gates = projected.new_empty(len(projected), 4 * size)
    hidden = hidden.clone()
    for rows in _times(batch_sizes, reverse):
        count = rows.stop - rows.start
        previous[rows] = before = hidden[:count].clone()
        recurrent = before @ weight.t() if bias is None else torch.addmm(bias, before, weight.t())
        (pr, pz, pn), (mr, mz, mn) = projected[rows].chunk(3, 1), recurrent.chunk(3, 1)
        r, z = (pr + mr).sigmoid(), (pz + mz).sigmoid()
        n = (pn + r * mn).tanh()
        gates[rows] = torch.cat([r, z, n, mn], 1)
        output[rows] = hidden[:count] = n + z * (before - n)
    return output, hidden, previous, gates


def gru_recurrence_backward(
    output_grad: Tensor | None,
    last_hidden_grad: Tensor | None,
    previous_grad: Tensor | None,
    gates_grad: Tensor | None,
    weight: Tensor,
    previous: Tensor,
    gates: Tensor,
    batch_sizes: Sequence[int],
    reverse: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    """The gradients of :func:`gru_recurrence`, from those of its results; a gradient that is None is zero.

    Returns `projected_grad` and `recurrent_grad` (N, 3H) and `hidden_grad` (B, H); the gradients of `weight` and `bias`
    are recurrent_grad^T previous and the sum of recurrent_grad. With `keep` there follows what the double backward
    takes, else a tensor of no rows: the gradient of h_t (N, H), with what comes from later times.
    """
    size = weight.shape[1]
    projected_grad, recurrent_grad = (gates.new_empty(len(gates), 3 * size) for _ in range(2))
    hidden_grads = gates.new_empty(len(gates) if keep else 0, size)
    hidden = gates.new_zeros(batch_sizes[0], size) if last_hidden_grad is None else last_hidden_grad.clone()
    of_output, of_previous = map(_rows_or_zeros, (output_grad, previous_grad))
    for rows in _times(batch_sizes, not reverse):
        count = rows.stop - rows.start
        r, z, n, m = gates[rows].chunk(4, 1)
        dh = hidden[:count] + of_output(rows)
        er, ez, en, em = (0.0,) * 4 if gates_grad is None else gates_grad[rows].chunk(4, 1)
        dn = (dh * (1 - z) + en) * (1 - n * n)
        dz = (dh * (previous[rows] - n) + ez) * z * (1 - z)
        dr = (dn * m + er) * r * (1 - r)
        projected_grad[rows] = torch.cat([dr, dz, dn], 1)
        recurrent_grad[rows] = torch.cat([dr, dz, dn * r + em], 1)
        hidden[:count] = recurrent_grad[rows] @ weight + dh * z + of_previous(rows)
        if keep:
            hidden_grads[rows] = dh
    return projected_grad, recurrent_grad, hidden, hidden_grads


def gru_recurrence_double_backward(
    projected_cotangent: Tensor,
    recurrent_cotangent: Tensor,
    hidden_cotangent: Tensor,
    weight: Tensor,
    previous: Tensor,
    gates: Tensor,
    projected_grad: Tensor,
    hidden_grads: Tensor,
    batch_sizes: Sequence[int],
    reverse: bool,
) -> tuple[Tensor, ...]:
    """The gradients of :func:`gru_recurrence_backward`, from those of its first three results; it also takes the first
    of these, and what was kept.

    Returns the gradients for `output_grad` (N, H), `last_hidden_grad` (B, H), `previous_grad` (N, H), `previous` (N, H)
    and `gates` (N, 4H); that for `weight` is recurrent_grad^T times the third.
    """
    size = weight.shape[1]
    output, before, previous_sources = (gates.new_empty(len(gates), size) for _ in range(3))
    sources = torch.empty_like(gates, memory_format=torch.contiguous_format)
    hidden = hidden_cotangent.clone()
    for rows in _times(batch_sizes, reverse):
        count = rows.stop - rows.start
        r, z, n, m = gates[rows].chunk(4, 1)
        dn, dh, change = projected_grad[rows, 2 * size :], hidden_grads[rows], previous[rows] - n
        before[rows] = old = hidden[:count].clone()
        ar, az, am = (recurrent_cotangent[rows] + old @ weight.t()).chunk(3, 1)
        pr, pz, pn = projected_cotangent[rows].chunk(3, 1)
        ar, az = ar + pr, az + pz
        ur, uz = ar * r * (1 - r), az * z * (1 - z)
        un = pn + am * r + ur * m
        u = un * (1 - n * n)
        output[rows] = hidden[:count] = u * (1 - z) + uz * change + old * z
        previous_sources[rows] = uz * dh
        sources[rows] = torch.cat(
            [
                dn * (am + ar * m * (1 - 2 * r)),
                dh * (az * change * (1 - 2 * z) + old - u),
                -dh * (2 * un * n * (1 - z) + uz),
                dn * ur,
            ],
            1,
        )
    return output, hidden, before, previous_sources, sources
