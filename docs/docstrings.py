"""Docstrings of this package as Markdown, for mkdocstrings: lists of arguments, labels, doctests, cross-references."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_ROLE = re.compile(r":(class|data|func|meth|mod):`~?([\w.]+)`")
_LABEL = re.compile(r"^((?:Cost|Errors|Memory|Source|Validity)[a-z ]*):(?=\s|$)")
_ITEM = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*|the rest): ")


class Docstrings(griffe.Extension):
    """Rewrites every docstring once all of the package is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value, obj)


def markdown(text: str, obj: griffe.Object) -> str:
    """A docstring of `obj` in Markdown."""
    blocks = re.split(r"\n(?:[ \t]*\n)+", text)
    return _ROLE.sub(lambda match: _link(*match.groups(), obj), "\n\n".join(map(_block, blocks)))


def _block(block: str) -> str:
    head, _, rest = block.partition("\n")
    if head.lstrip().startswith(">>>"):
        return f"```pycon\n{textwrap.dedent(block)}\n```"
    if head in ("Arguments:", "Attributes:"):
        return f"**{head}**\n\n{_items(textwrap.dedent(rest))}"
    return _LABEL.sub(r"**\1:**", block)


def _items(lines: str) -> str:
    """`names: text`, with what is indented below it, as a list."""
    found = []
    for item in re.split(r"\n(?=\S)", lines):
        names = _ITEM.match(item)
        if names is None:
            raise ValueError(f"expected 'name: text' in a list of a docstring; got {item!r}")
        text = " ".join(item[names.end() :].split())
        found.append(f"- {', '.join(f'`{name}`' for name in names[1].split(', '))}: {text}")
    return "\n".join(found)


def _link(role: str, name: str, obj: griffe.Object) -> str:
    """A link to what `name` means there, code where it is no part of the reference."""
    text = name.rpartition(".")[2] + ("()" if role in ("func", "meth") else "")
    if name.startswith(("hvp_engine.", "baselines.")):
        path = name
    else:
        scope = obj if role == "meth" else obj.module
        try:
            path = scope.resolve(name)
        except griffe.NameResolutionError:
            path = f"hvp_engine.{name}"
    return f'<autoref identifier="{path}" optional><code>{text}</code></autoref>'
