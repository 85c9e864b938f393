"""Faults of recurrent layers and their derivatives."""

from tools.faults.base import Fault

LEVELS, LAYERS = "tests/test_recurrent.py", "tests/test_recurrent_layers.py"
FOLDER = "hvp_engine/differentiable/recurrent"

FAULTS = [
    Fault(
        "csrc/recurrent_lstm.h",
        "of_squashed[j] = dh * (uo - T(2) * now * o * s[j]);",
        "of_squashed[j] = dh * (uo - now * o * s[j]);",
        f"{LEVELS} -k values_are_those",
        "the second derivative of an LSTM takes half of tanh's",
    ),
    Fault(
        "csrc/recurrent_run.h",
        "const bool down = r_.reverse != backwards;",
        "const bool down = backwards;",
        f"{LEVELS} -k values_are_those",
        "sequences that are to be read from their ends are read from their beginnings",
    ),
    Fault(
        "csrc/elementary_functions.h",
        "t = power * e.rest + (power - T(1));",
        "t = (power + power * e.rest) - T(1);",
        f"{LEVELS} -k activations",
        "tanh of small numbers loses its digits",
    ),
    Fault(
        "kernels/recurrent_gates.py",
        "return tl.where(y < 0.25, near, 1 - 2 / (1 + tl.exp(2 * x)))",
        "return 1 - 2 / (1 + tl.exp(2 * x))",
        f"{LEVELS} -k 'triton and activations'",
        "on a GPU, tanh of small numbers loses its digits",
    ),
    Fault(
        "kernels/recurrent_gates.py",
        "_plus(dh * z, previous_grad,",
        "_plus(dh * (1 - z), previous_grad,",
        f"{LEVELS} -k 'triton and values_are_those and packed and gru_recurrence_backward'",
        "on a GPU, the gradient of a GRU's old state passes through the wrong gate",
    ),
    Fault(
        f"{FOLDER}/reference.py",
        "dh * (az * change * (1 - 2 * z) + old - u),",
        "dh * (az * change * (1 - 2 * z) - u),",
        f"{LEVELS} -k first_and_second",
        "the second derivative of a GRU forgets that the old state passes through its gate",
    ),
    Fault(
        f"{FOLDER}/operations.py",
        "of_weight = recurrent.t() @ before if",
        "of_weight = projected.t() @ before if",
        f"{LEVELS} -k first_and_second",
        "the second derivative of a GRU takes the inputs' gradient of the candidate for the state's",
    ),
    Fault(
        f"{FOLDER}/layers.py",
        "if number > 0 and call.dropout > 0:",
        "if call.dropout > 0:",
        f"{LAYERS} -k torchs",
        "dropout is put in front of the first layer too",
    ),
]
