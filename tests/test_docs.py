"""The documentation: its code runs, its tables come from committed results, and its reference has every public name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import hvp_engine as hvp
from bench import documentation, products, report, results

DOCS = results.ROOT / "docs"
PAGES = [results.ROOT / "README.md", results.ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PEERS = ("betty", "curvlinops", "hypergrad", "torchopt")
"""Packages that a page may import and a test environment may lack."""

GIVEN = {
    "README.md": """
import torch
module = torch.nn.Linear(4, 3)
train_loader = val_loader = [(torch.randn(20, 4), torch.randint(3, (20,)))]
"""
}
"""What the code of a page takes for granted, since its reader has it."""

_HEADING_OR_CODE = re.compile(r"^## (?P<heading>[^\n]+)$|^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def sections() -> list[Any]:
    """The code of every section of every page: what is in the first section with code holds in all that follow."""
    found = []
    for page in PAGES:
        heading, code_of = "top", {}
        for match in _HEADING_OR_CODE.finditer(page.read_text()):
            heading = match["heading"] or heading
            code_of[heading] = code_of.get(heading, "") + (match["code"] or "")
        code_of = {heading: code for heading, code in code_of.items() if code}
        first = next(iter(code_of.values()), "")
        for heading, code in code_of.items():
            parts = [GIVEN.get(page.name, ""), first, *([] if code is first else [code])]
            found.append(pytest.param(parts, id=f"{page.stem}: {heading}"))
    return found


@pytest.mark.filterwarnings("ignore:the weights are far from a minimum")
@pytest.mark.parametrize("parts", sections())
def test_code_runs(parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PEERS:
        if re.search(rf"^from {name}\b", parts[-1], re.MULTILINE):
            pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    for part in parts:
        exec(compile(part, "page", "exec"), names)
