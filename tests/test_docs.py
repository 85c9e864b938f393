"""The documentation: its code runs, its tables come from committed results, and its reference has every public name."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import documentation, products, report, results

DOCS = results.ROOT / "docs"
PAGES = [results.ROOT / "README.md", results.ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PEERS = ("betty", "curvlinops", "hypergrad", "torchopt")
"""Packages that a page may import and a test environment may lack."""

PUBLIC = (
    "hvp_engine",
    "hvp_engine.diagnostics",
    "hvp_engine.differentiable",
    "hvp_engine.engines",
    "hvp_engine.hypergradients",
    "hvp_engine.solvers",
    "hvp_engine.tuning",
    "baselines.estimators",
    "baselines.search",
)
"""The modules whose names are documented, the shortest path to a name first."""

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""What torchrun tells a process, here the only one."""

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
    for variable, value in TORCHRUN.items():
        monkeypatch.setenv(variable, value)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    for part in parts:
        exec(compile(part, "page", "exec", dont_inherit=True), names)


def test_reference_has_every_public_name_by_its_shortest_path() -> None:
    documented = {
        path
        for page in (DOCS / "reference").glob("*.md")
        for path in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
    }
    shortest: dict[int, str] = {}
    for module in map(importlib.import_module, PUBLIC):
        for name in module.__all__:
            if not inspect.ismodule(getattr(module, name)):  # its names have a page
                shortest.setdefault(id(getattr(module, name)), f"{module.__name__}.{name}")
    assert documented == {*shortest.values(), "baselines.methods"}


@pytest.mark.parametrize("name", documentation.TABLES)
def test_tables_are_made_from_committed_results(name: str) -> None:
    assert len(documentation.TABLES[name]()) > 30
    assert any(f"<!-- table: {name} -->" in page.read_text() for page in PAGES), "no page has this table"


def test_readme_has_the_committed_results() -> None:
    readme = PAGES[0].read_text()
    assert report.summary(report.everything()) in readme, "README.md: run python -m bench.report"
    assert products.markdown() in readme, "README.md: put products.markdown() between its markers"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        place = results.FOLDER / Path(target).name if target.startswith("results/") else page.parent / target
        assert place.exists(), f"{page.name}: {target}"
