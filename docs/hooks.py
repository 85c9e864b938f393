"""Hooks of the documentation's build: tables from the committed results, and their figures and files beside the pages."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from bench.documentation import TABLES
from bench.results import FOLDER

_PLACE = re.compile(r"^<!-- table: (.+) -->$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Everything in bench/results, as results/NAME."""
    for path in sorted(FOLDER.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """`<!-- table: NAME -->` by the table of that name."""

    def table(place: re.Match[str]) -> str:
        if place[1] not in TABLES:
            raise PluginError(f"{page.file.src_uri}: expected a table of {', '.join(TABLES)}; got {place[1]!r}")
        return TABLES[place[1]]()

    return _PLACE.sub(table, markdown)
