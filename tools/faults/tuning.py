"""Faults of the Tuner: Algorithm 1, its optimizers, streams of batches, checkpoints."""

from tools.faults.base import Fault

REPLAYED = "tests/test_tuner_replayed.py tests/test_tuner_not_replayed.py"

FAULTS = [
    Fault(
        "hvp_engine/tuning/tuner.py",
        "        self.steps_to_go = self.inner_steps\n        return estimate is not None",
        "        self.steps_to_go = 1\n        return estimate is not None",
        "tests/test_tuner_steps.py tests/test_tuner.py",
        "every round but the first makes a single training step",
    ),
    Fault(
        "hvp_engine/tuning/tuner.py",
        "warm = self.steps_to_go <= self.inner_steps",
        "warm = True",
        "tests/test_tuner_steps.py tests/test_tuner.py",
        "the tolerance of inner training cuts the warm-up short",
    ),
    Fault(
        "hvp_engine/tuning/bilevel.py",
        "            self.failures += 1\n",
        "            pass\n",
        "tests/test_tuner_steps.py tests/test_tuner.py",
        "hypergradients may fail for ever",
    ),
    Fault(
        "hvp_engine/tuning/bilevel.py",
        '        self.failures = state["counters"]["failures"]\n',
        "",
        "tests/test_tuner_state.py",
        "a resumed run forgets how many hypergradients in a row have failed",
    ),
    Fault(
        "hvp_engine/tuning/bilevel.py",
        "loss = loss.reshape(()) if len(batches) == 1 else loss.reshape(()) / len(batches)",
        "loss = loss.reshape(())",
        "tests/test_tuner_steps.py tests/test_tuner.py",
        "accumulated batches are summed, not averaged",
    ),
    Fault(
        "hvp_engine/tuning/bilevel.py",
        "        self.weight_side.reset()\n",
        "",
        "tests/test_tuner_training.py",
        "retraining from scratch keeps the optimizer's momentum",
    ),
    Fault(
        "hvp_engine/tuning/optimizer_step.py",
        "            self.bounds.project(self.tensors)\n",
        "            pass\n",
        "tests/test_tuner_steps.py tests/test_tuner.py",
        "hyperparameters leave their bounds",
    ),
    Fault(
        "hvp_engine/tuning/optimizer_step.py",
        "                tensor.grad = grad\n        if self.bounds",
        "                tensor.grad = None\n        if self.bounds",
        "tests/test_tuner_steps.py tests/test_tuner.py tests/test_caller_state.py",
        "the caller's gradients are gone after a step",
    ),
    Fault(
        "hvp_engine/tuning/optimizer_step.py",
        "state = copy.deepcopy(state)",
        "state = dict(state)",
        "tests/test_tuner_state.py",
        "a loaded state changes while the run goes on",
    ),
    Fault(
        "hvp_engine/tuning/replayed.py",
        "        if before:\n",
        "        if False:\n",
        REPLAYED,
        "what recording a step changes stays changed",
    ),
    Fault(
        "hvp_engine/tuning/replayed_gradient.py",
        "            elif versions != versions_of(unchanging):\n",
        "            elif False:\n",
        REPLAYED,
        "a loss that writes into its batch is replayed, which writes into a copy",
    ),
    Fault(
        "hvp_engine/tuning/replayed_gradient.py",
        "            if read.keys() != kind.read.keys():\n",
        "            if False:\n",
        REPLAYED,
        "a graph goes on with memory that a loss has let go",
    ),
    Fault(
        "hvp_engine/tuning/replayed_gradient.py",
        "        changes |= {id(tensor): tensor for tensor in _small(kind.read, problem)}\n",
        "",
        REPLAYED,
        "statistics that belong to no module are moved by a recording",
    ),
    Fault(
        "hvp_engine/tuning/replayed_gradient.py",
        "kind.addresses == _addresses(problem, kind)",
        "True",
        REPLAYED,
        "a graph goes on with the memory of weights that have been replaced",
    ),
    Fault(
        "hvp_engine/tuning/replayed_step.py",
        "if all(map(torch.equal, found, self._changes)):",
        "if found:",
        REPLAYED,
        "an optimizer's graph is not compared with its step",
    ),
]
