"""Committed budgets of the kernels' counters."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

Counters = Mapping[str, Mapping[str, float]]  # by kernel and counter

# By how much a counter may exceed its budget; spills and ratios not at all.
_TOLERANCE = 0.02
_TOLERANT = ("registers", "instructions", "cycles", "per score")


def write(path: Path, counters: Counters) -> None:
    """One kernel a line, so that a difference shows which kernels changed."""
    lines = (f"{json.dumps(name)}: {json.dumps(of_kernel)}" for name, of_kernel in counters.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def complaints(path: Path, counters: Counters) -> Iterator[str]:
    """What exceeds its budget, has none, or was not measured."""
    budgets: Counters = json.loads(path.read_text())
    for name in [*budgets, *(name for name in counters if name not in budgets)]:
        if name not in counters:
            yield f"{name}: has a budget, and was not measured"
        elif name not in budgets:
            yield f"{name}: has no budget"
        else:
            yield from (f"{name}: {text}" for text in _compare(budgets[name], counters[name]))


def _compare(budget: Mapping[str, float], measured: Mapping[str, float]) -> Iterator[str]:
    for counter in [*budget, *(counter for counter in measured if counter not in budget)]:
        allowed, value = budget.get(counter), measured.get(counter)
        if allowed is None or value is None:
            yield f"{counter}: budget {allowed}, measured {value}"
        elif value > allowed * (1 + _TOLERANCE * counter.endswith(_TOLERANT)):
            yield f"{counter}: budget {allowed:g}, measured {value:g}"
