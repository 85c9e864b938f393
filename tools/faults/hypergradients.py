"""Faults of the formulas: implicit, fixed-point and unrolled hypergradients, response, influence."""

from tools.faults.base import Fault

FAULTS = [
    Fault(
        "hvp_engine/hypergradients/implicit.py",
        "second.add_(first.detach())",
        "second.sub_(first.detach())",
        "tests/test_implicit.py",
        "the direct term has the wrong sign",
    ),
    Fault(
        "hvp_engine/hypergradients/implicit.py",
        "self._previous = [part.clone() for part in parts.value]",
        "self._previous = list(parts.value)",
        "tests/test_implicit_state.py tests/test_right_hand_sides.py",
        "a caller who changes the solution changes the next warm start",
    ),
    Fault(
        "hvp_engine/hypergradients/implicit.py",
        '        self._previous = state["previous"]\n',
        "",
        "tests/test_right_hand_sides.py",
        "a resumed run starts its first solve cold",
    ),
    Fault(
        "hvp_engine/solvers/neumann.py",
        "alpha=1 / (1 + self.damping)",
        "alpha=1.0",
        "tests/test_fixed_point.py",
        "the automatic step of a fixed point ignores the damping",
    ),
    Fault(
        "hvp_engine/hypergradients/fixed_point.py",
        "differences = [weight - tensor for",
        "differences = [tensor - weight for",
        "tests/test_fixed_point.py",
        "the fixed point's residual has the wrong sign",
    ),
    Fault(
        "hvp_engine/differentiation/closing.py",
        "self._layout.total(-torch.stack(",
        "self._layout.total(torch.stack(",
        "tests/test_stationarity.py tests/test_implicit.py tests/test_estimators_state.py",
        "the change that training promises has the wrong sign",
    ),
    Fault(
        "hvp_engine/hypergradients/implicit.py",
        "            self._warned = True\n",
        "",
        "tests/test_stationarity.py",
        "the warning comes at every look",
    ),
    Fault(
        "hvp_engine/hypergradients/response.py",
        "part.detach().neg()",
        "part.detach()",
        "tests/test_response.py",
        "the best response's Jacobian has the wrong sign",
    ),
    Fault(
        "hvp_engine/hypergradients/influence.py",
        "return -self.matrix / len(self.matrix)",
        "return self.matrix / len(self.matrix)",
        "tests/test_influence.py -k leaving_out",
        "leaving an example out has the effect of adding it",
    ),
    Fault(
        "hvp_engine/hypergradients/update_rules.py",
        "scale = rate / (1 - first**count)",
        "scale = rate",
        "tests/test_estimators_unrolled.py -k 'torch_optim'",
        "Adam's mean is not corrected for its start",
    ),
    Fault(
        "hvp_engine/hypergradients/trajectory.py",
        "_dual(hyper, direction) if index >= trajectory.first else hyper",
        "_dual(hyper, direction)",
        "tests/test_estimators_unrolled.py",
        "forward mode differentiates the steps that truncation leaves out",
    ),
    Fault(
        "hvp_engine/hypergradients/autograd_api.py",
        '    _require_grad(hyper_list)\n    active = _active(weight_list)\n    with refused_if_stale("val_loss")',
        '    active = _active(weight_list)\n    with refused_if_stale("val_loss")',
        "tests/test_bad_input_tape.py tests/test_implicit.py",
        "hyperparameters without a graph give zeros instead of an error",
    ),
]
