"""Writes policies.json out for C++, CMake and Python. CMake runs this when it configures a build.

A row of policies.json is a score. It has a "name" and says whether it is "normalised"; it may have "parameters", each
with a "name" and whether it has a "gradient". "variant_of" is the score that users name to get this one, where a
parameter of theirs chooses it. "backward" is the score whose backward kernels serve this one, where it has none. A
score that is "band_only" has no loop but those over a band, so that operators with a choice of scores do not offer it.
"cuda" says whether there are CUDA kernels, which is so where it is left out.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).parent
REQUIRED = object()


@dataclass(frozen=True)
class Score:
    name: str
    normalised: bool
    variant_of: str
    backward: str
    band_only: bool
    cuda: bool
    parameters: dict[str, bool]  # whether each has a gradient

    @property
    def named(self) -> bool:
        """Whether users name it where they have a choice."""
        return self.variant_of == self.name and not self.band_only

    @property
    def class_name(self) -> str:
        return "".join(word.capitalize() for word in self.name.split("_"))


def fail(place: str, expected: str, got: object) -> NoReturn:
    raise SystemExit(f"policies.json: {place}: expected {expected}, got {got}")


def take(place: str, row: Any, kinds: dict[str, type], defaults: dict[str, Any]) -> list[Any]:
    """The row's values of these keys, each of its type."""
    if not isinstance(row, dict):
        fail(place, "an object", json.dumps(row))
    if unknown := row.keys() - kinds.keys():
        fail(place, f"the keys {', '.join(kinds)}", ", ".join(sorted(unknown)))
    values = []
    for key, kind in kinds.items():
        value = row.get(key, defaults.get(key, REQUIRED))
        if type(value) is not kind:
            fail(f"{place}.{key}", kind.__name__, "nothing" if value is REQUIRED else json.dumps(value))
        if key == "name" and not re.fullmatch("[a-z][a-z0-9]*(_[a-z0-9]+)*", value):
            fail(f"{place}.{key}", "a name like softmax_sink", json.dumps(value))
        values.append(value)
    return values


def read(path: Path) -> list[Score]:
    try:
        rows = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise SystemExit(f"policies.json: {error}") from None
    if not isinstance(rows, list) or not rows:
        fail("the file", "a list of scores", json.dumps(rows)[:80])
    kinds = {"name": str, "normalised": bool, "variant_of": str, "backward": str, "band_only": bool, "cuda": bool}
    kinds["parameters"] = list
    scores: dict[str, Score] = {}
    for i, row in enumerate(rows):
        own = row.get("name") if isinstance(row, dict) else None
        defaults = {"variant_of": own, "backward": own, "band_only": False, "cuda": True, "parameters": []}
        values = take(f"row {i}", row, kinds, defaults)
        parameters = [
            take(f"row {i}.parameters.{j}", parameter, {"name": str, "gradient": bool}, {})
            for j, parameter in enumerate(values.pop())
        ]
        score = Score(*values, dict(parameters))
        if score.name in scores:
            fail(f"row {i}.name", "a name of its own", score.name)
        scores[score.name] = score
    for i, score in enumerate(scores.values()):
        for key in ("variant_of", "backward"):
            other = scores.get(getattr(score, key))
            # A chain would say nothing that its end does not.
            if other is None or getattr(other, key) != other.name:
                ends = [s.name for s in scores.values() if getattr(s, key) == s.name]
                fail(f"row {i}.{key}", f"one of {', '.join(ends)}", getattr(score, key))
            if other.normalised != score.normalised:
                fail(f"row {i}.{key}", "a score that is normalised as this one is", other.name)
    return list(scores.values())


def quoted(names: Any) -> str:
    return f'"{", ".join(names)}"'


def cpp(scores: list[Score]) -> dict[str, str]:
    """The texts that replace the names between @ in the headers' templates."""
    enum = {score.name: f"k{score.class_name}" for score in scores}

    def cases(answer: Any, those: list[Score] = scores) -> str:
        return "\n".join(f"    case Score::{enum[score.name]}: return {answer(score)};" for score in those)

    def row(score: Score) -> str:
        return (
            f'    {{Score::{enum[score.name]}, "{score.name}", Score::{enum[score.variant_of]}, '
            f"{str(score.named).lower()}, {quoted(score.parameters)}}},"
        )

    return {
        "VALUES": ", ".join(enum.values()),
        "CUDA_CASES": cases(
            lambda score: f"action.template operator()<Score::{enum[score.name]}>()", [x for x in scores if x.cuda]
        ),
        "NORMALISED": cases(lambda score: str(score.normalised).lower()),
        "BAND_ONLY": cases(lambda score: str(score.band_only).lower()),
        "BACKWARD": cases(lambda score: f"Score::{enum[score.backward]}"),
        "ROWS": "\n".join(map(row, scores)),
        "NAMES": quoted(score.name for score in scores if score.named),
    }


def cmake(scores: list[Score]) -> str:
    lines = ["# Written from policies.json."]
    for name, those in {"SCORES": scores, "CUDA_SCORES": [x for x in scores if x.cuda]}.items():
        lines.append(f"set_property(GLOBAL PROPERTY ATTNX_{name} {' '.join(score.name for score in those)})")
    for score in scores:
        facts = {"CLASS": score.class_name, "ENUM": f"k{score.class_name}", "BACKWARD": score.backward}
        facts["BAND_ONLY"] = str(score.band_only).upper()
        for fact, value in facts.items():
            lines.append(f"set_property(GLOBAL PROPERTY ATTNX_SCORE_{score.name}_{fact} {value})")
    return "\n".join(lines) + "\n"


def python(scores: list[Score]) -> str:
    names = [score.name for score in scores if score.named]
    literal = ", ".join(f'"{name}"' for name in names)
    rows = []
    for name in names:
        family = [score for score in scores if score.variant_of == name]
        parameters = {parameter: gradient for score in family for parameter, gradient in score.parameters.items()}
        inner = ", ".join(f'"{parameter}": {gradient}' for parameter, gradient in parameters.items())
        rows.append(f'    "{name}": Score(normalised={family[0].normalised}, parameters={{{inner}}}),')
    return (HERE / "policies.py.in").read_text().replace("@NAMES@", literal).replace("@ROWS@", "\n".join(rows))


def write(path: Path, text: str) -> None:
    """Leaves a file that would not change, so that nothing is built again."""
    if path.exists() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def main(folder: Path) -> None:
    scores = read(HERE / "policies.json")
    fragments = cpp(scores)
    for name in ("score.h", "policies.h"):
        text = (HERE / f"{name}.in").read_text()
        for key, fragment in fragments.items():
            text = text.replace(f"@{key}@", fragment)
        write(folder / "include/attnx" / name, text)
    write(folder / "policies.cmake", cmake(scores))
    write(folder / "_policies.py", python(scores))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
