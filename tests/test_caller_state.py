"""Everything public leaves what is the caller's as it was: after a call that works, and after one that fails."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from call_descriptions import Call
from callers_state import Caller, differences, unusual_settings
from calls_of_every_public_name import CALLS, PARTS_OF

import hvp_engine as hvp

pytestmark = pytest.mark.filterwarnings("ignore")


def calls(failing: bool = True) -> list[Any]:
    return [
        pytest.param(
            call,
            id=f"{name} {number}{f', {call.error.__name__}' if call.error else ''}",
            marks=[pytest.mark.soak] if call.slow else [],
        )
        for name, found in CALLS.items()
        for number, call in enumerate(found)
        if failing or not call.error
    ]


def test_every_public_name_is_called() -> None:
    assert CALLS.keys() | PARTS_OF.keys() == set(hvp.__all__)


@pytest.mark.parametrize("settings", ["usual", "unusual"])
@pytest.mark.parametrize("call", calls())
def test_nothing_of_the_callers_changes(call: Call, settings: str) -> None:
    caller = Caller()
    with caller.cleanup, unusual_settings() if settings == "unusual" else contextlib.nullcontext():
        caller.fails_at = call.fails_at
        with torch.enable_grad():
            function = call.prepare(caller)
        before = caller.snapshot()
        with pytest.raises(call.error) if call.error else contextlib.nullcontext():
            assert isinstance(function(), call.returns)
        assert differences(before, caller.snapshot()) <= call.changes


@pytest.mark.parametrize("call", calls(failing=False))
def test_inference_mode_is_refused_or_makes_no_difference(call: Call) -> None:
    caller = Caller()
    with caller.cleanup:
        function = call.prepare(caller)
        with torch.inference_mode():
            before = caller.snapshot()
            try:
                assert isinstance(function(), call.returns)
            except hvp.GraphError as error:
                assert "expected a call outside torch.inference_mode" in str(error)
            assert differences(before, caller.snapshot()) <= call.changes


@pytest.mark.parametrize("engine", ["eager", "recorded", "linearized"])
def test_weights_made_in_inference_mode_are_refused(engine: str) -> None:
    with torch.inference_mode():
        w = torch.ones(3)
    with pytest.raises(hvp.GraphError, match="got one made under torch.inference_mode: clone it"):
        hvp.HessianOperator(lambda w: w.square().sum(), w, engine=engine)
    operator = hvp.HessianOperator(lambda w: w.square().sum(), w.clone(), engine=engine)
    assert torch.equal(operator @ w, 2 * torch.ones(3))
