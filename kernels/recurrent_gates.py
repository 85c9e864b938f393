"""One time of an LSTM or GRU and of its derivatives, for all sequences that have not ended: what lies between two
products of matrices.

Each kernel is a step of the function of the reference in :mod:`hvp_engine.differentiable.recurrent.reference`, whose
names it has. It finds its rows in the tensors of the whole sequence, from `first` on, and moves the states (rows of
`count` sequences) in place; those of sequences that have ended stay as they are. Derivatives are named after what they
belong to.
"""

import triton
import triton.language as tl

step = triton.jit(do_not_specialize=["first", "count"])
"""The numbers that differ from time to time are not compiled in."""


@triton.jit
def _tanh(x):
    """By Lambert's continued fraction where 1 - 2 / (1 + exp(2 x)) would lose digits."""
    y = x * x
    near = x * (135135 + y * (17325 + y * (378 + y))) / (135135 + y * (62370 + y * (3150 + y * 28)))
    return tl.where(y < 0.25, near, 1 - 2 / (1 + tl.exp(2 * x)))


@triton.jit
def _tile(first, count, units, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """(places in a state, rows of the whole sequence, units, whether they exist)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)[None, :]
    return row * units + unit, first + row, unit, (row < count) & (unit < units)


@triton.jit
def _one(tensor, place, inside):
    return tl.load(tensor + place, mask=inside, other=0.0)


@triton.jit
def _three(tensor, place, units, inside):
    return _one(tensor, place, inside), _one(tensor, place + units, inside), _one(tensor, place + 2 * units, inside)


@triton.jit
def _four(tensor, place, units, inside):
    a, b, c = _three(tensor, place, units, inside)
    return a, b, c, _one(tensor, place + 3 * units, inside)


@triton.jit
def _plus(value, tensor, place, inside):
    """With a gradient that may be missing."""
    if tensor is not None:
        value += _one(tensor, place, inside)
    return value


@triton.jit
def _put_three(tensor, place, units, a, b, c, inside):
    tl.store(tensor + place, a, mask=inside)
    tl.store(tensor + place + units, b, mask=inside)
    tl.store(tensor + place + 2 * units, c, mask=inside)


@triton.jit
def _put_four(tensor, place, units, a, b, c, d, inside):
    _put_three(tensor, place, units, a, b, c, inside)
    tl.store(tensor + place + 3 * units, d, mask=inside)


@step
def lstm_gates(
    first, count, units, projected, output, hidden, cell, previous, gates, previous_cell, squashed,
    ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """`gates` hold the product of weight and state, and get the gates."""
    state, row, unit, inside = _tile(first, count, units, ROWS, UNITS)
    single, quad = row * units + unit, row * (4 * units) + unit
    i, f, g, o = _four(gates, quad, units, inside)
    xi, xf, xg, xo = _four(projected, quad, units, inside)
    i, f, g, o = tl.sigmoid(xi + i), tl.sigmoid(xf + f), _tanh(xg + g), tl.sigmoid(xo + o)
    before = _one(cell, state, inside)
    new = f * before + i * g
    s = _tanh(new)
    tl.store(previous + single, _one(hidden, state, inside), mask=inside)
    tl.store(previous_cell + single, before, mask=inside)
    _put_four(gates, quad, units, i, f, g, o, inside)
    tl.store(squashed + single, s, mask=inside)
    tl.store(output + single, o * s, mask=inside)
    tl.store(hidden + state, o * s, mask=inside)
    tl.store(cell + state, new, mask=inside)


@step
def lstm_gates_backward(
    first, count, units, output_grad, previous_grad, gates_grad, previous_cell_grad, squashed_grad, gates,
    previous_cell, squashed, projected_grad, hidden, cell, hidden_grads, cell_grads,
    ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """`hidden` gets what the product of `projected_grad` and weight is then added to."""
    state, row, unit, inside = _tile(first, count, units, ROWS, UNITS)
    single, quad = row * units + unit, row * (4 * units) + unit
    i, f, g, o = _four(gates, quad, units, inside)
    s = _one(squashed, single, inside)
    dh = _plus(_one(hidden, state, inside), output_grad, single, inside)
    dc = _one(cell, state, inside) + _plus(dh * o, squashed_grad, single, inside) * (1 - s * s)
    di = _plus(dc * g, gates_grad, quad, inside) * i * (1 - i)
    df = _plus(dc * _one(previous_cell, single, inside), gates_grad, quad + units, inside) * f * (1 - f)
    dg = _plus(dc * i, gates_grad, quad + 2 * units, inside) * (1 - g * g)
    do = _plus(dh * s, gates_grad, quad + 3 * units, inside) * o * (1 - o)
    _put_four(projected_grad, quad, units, di, df, dg, do, inside)
    tl.store(hidden + state, _plus(tl.zeros_like(dh), previous_grad, single, inside), mask=inside)
    tl.store(cell + state, _plus(dc * f, previous_cell_grad, single, inside), mask=inside)
    if hidden_grads is not None:
        tl.store(hidden_grads + single, dh, mask=inside)
        tl.store(cell_grads + single, dc, mask=inside)


@step
def lstm_gates_double_backward(
    first, count, units, cotangent, gates, previous_cell, squashed, hidden_grads, cell_grads, output, hidden, cell,
    previous, for_gates, for_previous_cell, for_squashed, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """`for_gates` hold the product of weight and state, and get the gradient of the gates."""
    state, row, unit, inside = _tile(first, count, units, ROWS, UNITS)
    single, quad = row * units + unit, row * (4 * units) + unit
    i, f, g, o = _four(gates, quad, units, inside)
    s, before = _one(squashed, single, inside), _one(previous_cell, single, inside)
    dh, dc = _one(hidden_grads, single, inside), _one(cell_grads, single, inside)
    ai, af, ag, ao = _four(cotangent, quad, units, inside)
    bi, bf, bg, bo = _four(for_gates, quad, units, inside)
    ai, af, ag, ao = ai + bi, af + bf, ag + bg, ao + bo
    ui, uf, ug, uo = ai * i * (1 - i), af * f * (1 - f), ag * (1 - g * g), ao * o * (1 - o)
    old = _one(cell, state, inside)
    new = ui * g + uf * before + ug * i + old * f
    u = new * (1 - s * s)
    tl.store(previous + single, _one(hidden, state, inside), mask=inside)
    for_i, for_f = dc * (ai * g * (1 - 2 * i) + ug), dc * (af * before * (1 - 2 * f) + old)
    for_g, for_o = dc * (ui - 2 * ag * i * g), dh * (ao * s * (1 - 2 * o) + u)
    _put_four(for_gates, quad, units, for_i, for_f, for_g, for_o, inside)
    tl.store(for_previous_cell + single, uf * dc, mask=inside)
    tl.store(for_squashed + single, dh * (uo - 2 * new * o * s), mask=inside)
    tl.store(output + single, uo * s + u * o, mask=inside)
    tl.store(hidden + state, uo * s + u * o, mask=inside)
    tl.store(cell + state, new, mask=inside)


@step
def gru_gates(
    first, count, units, projected, bias, output, hidden, previous, gates, ROWS: tl.constexpr, UNITS: tl.constexpr
):
    """The last three quarters of `gates` hold the product of weight and state; `gates` get r, z, n and m_n."""
    state, row, unit, inside = _tile(first, count, units, ROWS, UNITS)
    single, quad = row * units + unit, row * (4 * units) + unit
    xr, xz, xn = _three(projected, row * (3 * units) + unit, units, inside)
    mr, mz, mn = _three(gates, quad + units, units, inside)
    mr, mz = _plus(mr, bias, unit, inside), _plus(mz, bias, units + unit, inside)
    mn = _plus(mn, bias, 2 * units + unit, inside)
    before = _one(hidden, state, inside)
    r, z = tl.sigmoid(xr + mr), tl.sigmoid(xz + mz)
    n = _tanh(xn + r * mn)
    new = n + z * (before - n)
    _put_four(gates, quad, units, r, z, n, mn, inside)
    tl.store(previous + single, before, mask=inside)
    tl.store(output + single, new, mask=inside)
    tl.store(hidden + state, new, mask=inside)


@step
def gru_gates_backward(
    first, count, units, output_grad, previous_grad, gates_grad, previous, gates, projected_grad, recurrent_grad,
    hidden, hidden_grads, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """`hidden` gets what the product of `recurrent_grad` and weight is then added to."""
    state, row, unit, inside = _tile(first, count, units, ROWS, UNITS)
    single, quad, triple = row * units + unit, row * (4 * units) + unit, row * (3 * units) + unit
    r, z, n, m = _four(gates, quad, units, inside)
    dh = _plus(_one(hidden, state, inside), output_grad, single, inside)
    dn = _plus(dh * (1 - z), gates_grad, quad + 2 * units, inside) * (1 - n * n)
    dz = _plus(dh * (_one(previous, single, inside) - n), gates_grad, quad + units, inside) * z * (1 - z)
    dr = _plus(dn * m, gates_grad, quad, inside) * r * (1 - r)
    _put_three(projected_grad, triple, units, dr, dz, dn, inside)
    of_m = _plus(dn * r, gates_grad, quad + 3 * units, inside)
    _put_three(recurrent_grad, triple, units, dr, dz, of_m, inside)
    tl.store(hidden + state, _plus(dh * z, previous_grad, single, inside), mask=inside)
    if hidden_grads is not None:
        tl.store(hidden_grads + single, dh, mask=inside)


@step
def gru_gates_double_backward(
    first, count, units, projected_cotangent, recurrent_cotangent, previous, gates, projected_grad, hidden_grads,
    output, hidden, for_previous_grad, for_previous, for_gates, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """The last three quarters of `for_gates` hold the product of weight and state; `for_gates` get the gradient of the
    gates."""
    state, row, unit, inside = _tile(first, count, units, ROWS, UNITS)
    single, quad, triple = row * units + unit, row * (4 * units) + unit, row * (3 * units) + unit
    r, z, n, m = _four(gates, quad, units, inside)
    dn, dh = _one(projected_grad, triple + 2 * units, inside), _one(hidden_grads, single, inside)
    change, old = _one(previous, single, inside) - n, _one(hidden, state, inside)
    pr, pz, pn = _three(projected_cotangent, triple, units, inside)
    ar, az, am = _three(recurrent_cotangent, triple, units, inside)
    br, bz, bm = _three(for_gates, quad + units, units, inside)
    ar, az, am = ar + br + pr, az + bz + pz, am + bm
    ur, uz = ar * r * (1 - r), az * z * (1 - z)
    un = pn + am * r + ur * m
    u = un * (1 - n * n)
    new = u * (1 - z) + uz * change + old * z
    for_r, for_z = dn * (am + ar * m * (1 - 2 * r)), dh * (az * change * (1 - 2 * z) + old - u)
    _put_four(for_gates, quad, units, for_r, for_z, -dh * (2 * un * n * (1 - z) + uz), dn * ur, inside)
    tl.store(for_previous_grad + single, old, mask=inside)
    tl.store(for_previous + single, uz * dh, mask=inside)
    tl.store(output + single, new, mask=inside)
    tl.store(hidden + state, new, mask=inside)
