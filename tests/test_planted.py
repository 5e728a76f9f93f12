"""The faults that tests/mutants.py plants still have their places: what they replace stands in the sources once."""

from __future__ import annotations

from pathlib import Path

import pytest

from planted import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{Path(mutant.file).stem}: {mutant.text[:40]}")
def test_expression_is_there_once(mutant: Mutant) -> None:
    mutant.place((Path(__file__).parents[1] / mutant.file).read_text())
