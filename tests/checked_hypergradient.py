"""hvp.check on a problem of tests/problems_with_known_answers.py."""

from __future__ import annotations

from typing import Any

from problems_with_known_answers import Bilevel

import hvp_engine as hvp

ENOUGH = hvp.Neumann(300)
NOTHING = (None, None)


def check_case(case: Bilevel, **options: Any) -> hvp.CheckResult:
    options = {"solver": ENOUGH, "weights": case.weights, "engine": "eager"} | options
    losses = options.pop("train_loss", case.train_loss), options.pop("val_loss", case.val_loss)
    return hvp.check(*losses, options.pop("weights"), case.hyper, NOTHING, **options)
