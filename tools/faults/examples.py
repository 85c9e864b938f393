"""Faults of experiments whose results are quoted: what is trained on, tuned on and judged by, and how it is read."""

from tools.faults.base import Fault

FAULTS = [
    Fault(
        "examples/augmentations.py",
        "residual = self.unbounded(x) - self.unbounded(",
        "residual = self.unbounded(x) + self.unbounded(",
        "tests/test_examples_augmentation.py",
        "the residual is even in the noise, so it can learn a deterministic change",
    ),
    Fault(
        "examples/augmentation.py",
        "tuned_on = x[held_back:], labels[held_back:]",
        "tuned_on = x, labels",
        "tests/test_examples_augmentation.py",
        "hypergradients see the images that are held back to choose by",
    ),
    Fault(
        "examples/augmentation.py",
        "if problem.row.everything else (images.train,)",
        "if problem.row.approximation else (images.train,)",
        "tests/test_examples_augmentation.py",
        "tuned rows train on the validation images",
    ),
    Fault(
        "examples/validation_splits.py",
        "return self.val_loss(weights, decays, batch) + torch.stack(penalties).sum()",
        "return self.val_loss(weights, decays, batch) + torch.stack(penalties).sum() / 2",
        "tests/test_examples_splits.py",
        "the penalty is half of what is said",
    ),
    Fault(
        "examples/validation_splits.py",
        "            importance[part, column] = 1 / len(part)\n",
        "            importance[part, column] = 1 / len(labels)\n",
        "tests/test_examples_splits.py",
        "the loss of a small part counts less beside its penalty",
    ),
    Fault(
        "examples/validation_splits.py",
        "self.of(name, self.best(name, chosen, other), when)[half]",
        "self.of(name, self.best(name, chosen, half), when)[half]",
        "tests/test_examples_splits.py",
        "shares are measured on the seeds that chose them",
    ),
    Fault(
        "examples/overfitting.py",
        'if name.startswith(("train", "validation"))]',
        'if name in ("train", "validation")]',
        "tests/test_examples_paper.py",
        "a run ends although BatchNorm's statistics of the batch leave something wrong",
    ),
    Fault(
        "examples/training.py",
        "            self._start += time.process_time() - before\n",
        "",
        "tests/test_examples_ptb.py",
        "evaluations count as time of training, which gives plain training of equal time more steps",
    ),
]
