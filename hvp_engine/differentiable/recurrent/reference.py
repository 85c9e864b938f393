"""What the recurrences of LSTM and GRU and their derivatives compute, in plain torch.

A recurrence is what remains of a layer when the matrix products over the whole sequence are made outside: it starts
from `projected` = x W_ih^T + b. Sequences are packed, as in :class:`torch.nn.utils.rnn.PackedSequence`: time t has
`batch_sizes[t]` rows, which never grows, and N = sum(batch_sizes) is the number of rows of everything that has a
value at each time. B = batch_sizes[0] is the number of sequences, H that of units.

Each recurrence is a function of three levels, written out here. Its backward is linear in the gradients that it takes,
and a function of what the forward has kept; the backward of that one gives gradients for both. So a product with the
Hessian is one pass forward in time, `*_double_backward`, and one pass back, `*_backward` again, into which everything
that the first one found flows. Nothing is written in place, so that autograd can differentiate all of this further.
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


def _together(times: Sequence[Sequence[Tensor]], reverse: bool) -> list[Tensor]:
    """What has been found at each time, in the order of the rows."""
    return [torch.cat(found[::-1] if reverse else found) for found in zip(*times, strict=True)]


def _replaced(state: Tensor, first: Tensor) -> Tensor:
    """The state with other rows for the sequences that still go on, which are the first ones."""
    return first if len(first) == len(state) else torch.cat([first, state[len(first) :]])


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
    times = []
    for rows in _times(batch_sizes, reverse):
        before, old = hidden[: rows.stop - rows.start], cell[: rows.stop - rows.start]
        i, f, g, o = (projected[rows] + before @ weight.t()).chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        new = f * old + i * g
        s = new.tanh()
        hidden, cell = _replaced(hidden, o * s), _replaced(cell, new)
        times.append((o * s, before, torch.cat([i, f, g, o], 1), old, s))
    output, *saved = _together(times, reverse)
    return output, hidden.clone(), cell.clone(), *saved


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
    hidden, cell = (
        gates.new_zeros(batch_sizes[0], size) if gradient is None else gradient
        for gradient in (last_hidden_grad, last_cell_grad)
    )
    of_output, of_previous, of_cell, of_squashed = map(
        _rows_or_zeros, (output_grad, previous_grad, previous_cell_grad, squashed_grad)
    )
    times = []
    for rows in _times(batch_sizes, not reverse):
        count = rows.stop - rows.start
        i, f, g, o = gates[rows].chunk(4, 1)
        s = squashed[rows]
        dh = hidden[:count] + of_output(rows)
        dc = cell[:count] + (dh * o + of_squashed(rows)) * (1 - s * s)
        di, df, dg, do = dc * g, dc * previous_cell[rows], dc * i, dh * s
        if gates_grad is not None:
            di, df, dg, do = (x + y for x, y in zip((di, df, dg, do), gates_grad[rows].chunk(4, 1), strict=True))
        d = torch.cat([di * i * (1 - i), df * f * (1 - f), dg * (1 - g * g), do * o * (1 - o)], 1)
        hidden, cell = _replaced(hidden, d @ weight + of_previous(rows)), _replaced(cell, dc * f + of_cell(rows))
        times.append((d, dh, dc))
    projected_grad, *kept = _together(times, not reverse)
    return projected_grad, hidden.clone(), cell.clone(), *(one if keep else gates.new_empty(0, size) for one in kept)


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
    hidden, cell = hidden_cotangent, cell_cotangent
    times = []
    for rows in _times(batch_sizes, reverse):
        count = rows.stop - rows.start
        i, f, g, o = gates[rows].chunk(4, 1)
        s, before, dh, dc = squashed[rows], previous_cell[rows], hidden_grads[rows], cell_grads[rows]
        state, old = hidden[:count], cell[:count]
        ai, af, ag, ao = (projected_cotangent[rows] + state @ weight.t()).chunk(4, 1)
        ui, uf, ug, uo = ai * i * (1 - i), af * f * (1 - f), ag * (1 - g * g), ao * o * (1 - o)
        new = ui * g + uf * before + ug * i + old * f
        u = new * (1 - s * s)
        hidden, cell = _replaced(hidden, uo * s + u * o), _replaced(cell, new)
        sources = torch.cat(
            [
                dc * (ai * g * (1 - 2 * i) + ug),
                dc * (af * before * (1 - 2 * f) + old),
                dc * (ui - 2 * ag * i * g),
                dh * (ao * s * (1 - 2 * o) + u),
            ],
            1,
        )
        times.append((uo * s + u * o, state, sources, uf * dc, dh * (uo - 2 * new * o * s)))
    output, *found = _together(times, reverse)
    return output, hidden.clone(), cell.clone(), *found


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
    times = []
    for rows in _times(batch_sizes, reverse):
        before = hidden[: rows.stop - rows.start]
        recurrent = before @ weight.t() if bias is None else torch.addmm(bias, before, weight.t())
        (pr, pz, pn), (mr, mz, mn) = projected[rows].chunk(3, 1), recurrent.chunk(3, 1)
        r, z = (pr + mr).sigmoid(), (pz + mz).sigmoid()
        n = (pn + r * mn).tanh()
        new = n + z * (before - n)
        hidden = _replaced(hidden, new)
        times.append((new, before, torch.cat([r, z, n, mn], 1)))
    output, *saved = _together(times, reverse)
    return output, hidden.clone(), *saved


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
    hidden = gates.new_zeros(batch_sizes[0], size) if last_hidden_grad is None else last_hidden_grad
    of_output, of_previous = map(_rows_or_zeros, (output_grad, previous_grad))
    times = []
    for rows in _times(batch_sizes, not reverse):
        r, z, n, m = gates[rows].chunk(4, 1)
        dh = hidden[: rows.stop - rows.start] + of_output(rows)
        er, ez, en, em = (0.0,) * 4 if gates_grad is None else gates_grad[rows].chunk(4, 1)
        dn = (dh * (1 - z) + en) * (1 - n * n)
        dz = (dh * (previous[rows] - n) + ez) * z * (1 - z)
        dr = (dn * m + er) * r * (1 - r)
        d = torch.cat([dr, dz, dn * r + em], 1)
        hidden = _replaced(hidden, d @ weight + dh * z + of_previous(rows))
        times.append((torch.cat([dr, dz, dn], 1), d, dh))
    projected_grad, recurrent_grad, kept = _together(times, not reverse)
    return projected_grad, recurrent_grad, hidden.clone(), kept if keep else gates.new_empty(0, size)


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
    hidden = hidden_cotangent
    times = []
    for rows in _times(batch_sizes, reverse):
        r, z, n, m = gates[rows].chunk(4, 1)
        dn, dh, change = projected_grad[rows, 2 * size :], hidden_grads[rows], previous[rows] - n
        old = hidden[: rows.stop - rows.start]
        ar, az, am = (recurrent_cotangent[rows] + old @ weight.t()).chunk(3, 1)
        pr, pz, pn = projected_cotangent[rows].chunk(3, 1)
        ar, az = ar + pr, az + pz
        ur, uz = ar * r * (1 - r), az * z * (1 - z)
        un = pn + am * r + ur * m
        u = un * (1 - n * n)
        new = u * (1 - z) + uz * change + old * z
        hidden = _replaced(hidden, new)
        sources = torch.cat(
            [
                dn * (am + ar * m * (1 - 2 * r)),
                dh * (az * change * (1 - 2 * z) + old - u),
                -dh * (2 * un * n * (1 - z) + uz),
                dn * ur,
            ],
            1,
        )
        times.append((new, old, uz * dh, sources))
    output, *found = _together(times, reverse)
    return output, hidden.clone(), *found
