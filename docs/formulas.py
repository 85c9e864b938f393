"""Display formulas of the pages: LaTeX in a `math` fence, which GitHub renders too, becomes MathML.

Browsers draw MathML themselves, so that the built pages need no script and nothing from another server.
"""

from __future__ import annotations

from typing import Any

from latex2mathml.converter import convert


def display(source: str, *_: Any, **__: Any) -> str:
    """A fence's LaTeX as a block of MathML."""
    return f"<p>{convert(source, display='block')}</p>"
