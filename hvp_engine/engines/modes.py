"""Modes of the modules that a loss calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Modes:
    """Whether the modules that a loss called are in train or eval mode, as a trace saw it."""

    def __init__(self, modules: Sequence[torch.nn.Module]):
        self.modules = list(modules)
        self._parts = [part for module in self.modules for part in module.modules()]
        self._seen = [part.training for part in self._parts]

    def unchanged(self) -> bool:
        return self._seen == [part.training for part in self._parts]
