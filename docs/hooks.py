"""Hooks of the documentation's build: what pages take from elsewhere in the repository.

`<!-- table: NAME -->` is replaced by a table of bench/documentation.py, `<!-- file: NAME -->` by a file of the root,
`<!-- functions: FILE: NAME, NAME -->` by the source of functions in a file; every file of bench/results is there as
results/NAME.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from bench.documentation import TABLES
from bench.results import FOLDER, ROOT

_PLACE = re.compile(r"^<!-- (table|file|functions): (.+) -->$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the committed results."""
    for path in sorted(FOLDER.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the places of a page."""

    def content(place: re.Match[str]) -> str:
        kind, name = place.groups()
        if kind == "table" and name in TABLES:
            return TABLES[name]()
        if kind == "file" and (ROOT / name).exists():
            return (ROOT / name).read_text().replace("](docs/", "](")  # links as the page sees them
        if kind == "functions":
            return _functions(*name.split(": "))
        raise PluginError(f"{page.file.src_uri}: there is no {kind} {name!r}")

    return _PLACE.sub(content, markdown)


def _functions(file: str, names: str) -> str:
    """The source of some functions of a file, as a block of code."""
    source = (ROOT / file).read_text()
    found = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    if missing := [name for name in names.split(", ") if name not in found]:
        raise PluginError(f"{file} has no function {', '.join(missing)}")
    code = "\n\n\n".join(ast.get_source_segment(source, found[name]) or "" for name in names.split(", "))
    return f"```python\n{code}\n```"
