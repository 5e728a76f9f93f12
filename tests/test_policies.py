"""The table of scores: what a build writes of it for Python, and how it refuses a row."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

from attnx._policies import SCORES, ScoreName

FOLDER = Path(__file__).parents[1] / "csrc" / "attnx"


@pytest.fixture(scope="module")
def policies() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_policies", FOLDER / "write_policies.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


def test_python_sees_the_scores_that_users_name() -> None:
    rows = json.loads((FOLDER / "policies.json").read_text())
    named = [row for row in rows if row.get("variant_of", row["name"]) == row["name"] and not row.get("band_only")]
    assert get_args(ScoreName) == tuple(SCORES) == tuple(row["name"] for row in named)
    for row in named:
        variants = [v for v in rows if v.get("variant_of", v["name"]) == row["name"]]
        parameters = {p["name"]: p["gradient"] for v in variants for p in v.get("parameters", [])}
        assert SCORES[row["name"]] == (row["normalised"], parameters)


GOOD = {"name": "a", "normalised": True}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "the file: expected a list of scores, got {}"),
        ([3], "row 0: expected an object, got 3"),
        ([{"name": "a"}], "row 0.normalised: expected bool, got nothing"),
        ([{**GOOD, "cuda": 1}], "row 0.cuda: expected bool, got 1"),
        ([{**GOOD, "band_only": "yes"}], 'row 0.band_only: expected bool, got "yes"'),
        ([{**GOOD, "normalised": 1}], "row 0.normalised: expected bool, got 1"),
        ([{**GOOD, "normalized": True}], "row 0: expected the keys name, normalised, .*, got normalized"),
        ([{**GOOD, "name": "SoftMax"}], 'row 0.name: expected a name like softmax_sink, got "SoftMax"'),
        ([GOOD, GOOD], "row 1.name: expected a name of its own, got a"),
        ([GOOD, {**GOOD, "name": "b", "backward": "c"}], "row 1.backward: expected one of a, got c"),
        ([GOOD, {"name": "b", "normalised": False, "variant_of": "a"}], "row 1.variant_of: expected a score that is"),
        ([{**GOOD, "parameters": [{"name": "x"}]}], "row 0.parameters.0.gradient: expected bool, got nothing"),
    ],
)
def test_a_wrong_row_is_named(policies: ModuleType, tmp_path: Path, rows: Any, message: str) -> None:
    file = tmp_path / "policies.json"
    file.write_text(json.dumps(rows))
    with pytest.raises(SystemExit, match=f"^policies.json: {message}"):
        policies.read(file)


def test_a_file_that_is_no_json_is_refused(policies: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "policies.json").write_text("[{,")
    with pytest.raises(SystemExit, match=r"^policies.json: .* line 1 column 3"):
        policies.read(tmp_path / "policies.json")
