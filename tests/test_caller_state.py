"""Everything public leaves what is the caller's as it was: after a call that works, and after one that fails."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from caller import Caller, differences, unusual_settings
from public_calls import CALLS, Call

import hvp_engine as hvp

pytestmark = pytest.mark.filterwarnings("ignore")


def calls() -> list[Any]:
    return [
        pytest.param(call, id=f"{name} {number}{f', {call.error.__name__}' if call.error else ''}")
        for name, found in CALLS.items()
        for number, call in enumerate(found)
    ]


def test_every_public_name_is_called() -> None:
    assert CALLS.keys() == set(hvp.__all__)


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
