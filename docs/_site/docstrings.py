"""Docstrings are written for Python's own help, in reStructuredText; this makes them the Markdown of the site."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any

import griffe

SHARED_ARGUMENTS = "attnx.nn.arguments.ProjectionArguments"


class Markdown(griffe.Extension):
    """Roles become links and code, ``.. math::`` becomes a formula, and modules list the arguments that they share."""

    def on_package(self, *, pkg: griffe.Module, **others: Any) -> None:
        shared = pkg[SHARED_ARGUMENTS.partition(".")[2]].docstring.value.partition("Attributes:\n")[2]
        for x in _objects(pkg):
            if x.docstring:
                text = re.sub(
                    r"^( *)\{projection_arguments\}$",
                    lambda line: textwrap.indent(textwrap.dedent(shared).rstrip(), line[1]),
                    x.docstring.value,
                    flags=re.MULTILINE,
                )
                text = re.sub(r"^( *)\.\. math::(.*(?:\n\1 +\S.*)*)", _formula, text, flags=re.MULTILINE)
                text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
                x.docstring.value = re.sub(
                    r":(?:func|class|meth|mod|attr|data):`([^`]*)`", lambda role, x=x: _link(role[1], x, pkg), text
                )


def _objects(x: griffe.Object) -> Iterator[griffe.Object]:
    yield x
    for member in x.members.values():
        if not member.is_alias:
            yield from _objects(member)


def _formula(directive: re.Match[str]) -> str:
    indent = directive[1]
    lines = ["$$", *(line.strip() for line in directive[2].strip().splitlines()), "$$"]
    return "\n".join(indent + line for line in lines)


def _link(name: str, x: griffe.Object, pkg: griffe.Module) -> str:
    """A link to what the name stands for where it is used, if that is public."""
    scopes = [pkg.path]
    while x.parent is not None:
        scopes.append(x.path)
        x = x.parent
    for scope in (None, *reversed(scopes)):
        path = f"{scope}.{name}" if scope else name
        target = _lookup(pkg, path)
        if target is not None and _is_public(target, pkg):
            return f"[`{name}`][{target.path}]"
    return f"`{name}`"


def _lookup(pkg: griffe.Module, path: str) -> griffe.Object | None:
    package, _, rest = path.partition(".")
    if package != pkg.path or not rest:
        return None
    try:
        found = pkg[rest]
        return found.final_target if found.is_alias else found
    except (KeyError, griffe.AliasResolutionError):
        return None


def _is_public(x: griffe.Object, pkg: griffe.Module) -> bool:
    """Whether a page has it: it stands in the ``__all__`` of its module, or its class does."""
    if x.is_module:
        return False
    owner = x if x.parent is None or not x.parent.is_class else x.parent
    return owner.parent is not None and owner.name in (owner.parent.exports or ())
