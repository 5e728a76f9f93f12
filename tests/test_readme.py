"""README and docs keep their word: examples run, the capabilities are the table, every public name is on a page."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from attnx import _capability

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
EXAMPLES = BLOCK.findall(README)
OPTIONAL = ("transformers", "diffusers")  # their examples run where they are installed


def of_bfloat16(example: str) -> bool:
    """Tells whether all random inputs are bfloat16, so that CUDA's kernels take the example."""
    return all("dtype=torch.bfloat16" in call for call in re.findall(r"torch\.randn\([^)]*\)", example))


def needs(example: str) -> list[pytest.MarkDecorator]:
    return [] if of_bfloat16(example) else [pytest.mark.needs("float32")]


def run(example: str, where: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPTIONAL:
        if re.search(rf"^(import|from) .*\b{name}\b", example, flags=re.MULTILINE):
            pytest.importorskip(name)
    monkeypatch.chdir(folder)  # examples save models
    exec(compile(example, where, "exec"), {"__name__": "__main__"})


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "example",
    [pytest.param(x, marks=needs(x)) for x in EXAMPLES],
    ids=[example.strip().splitlines()[-1] for example in EXAMPLES],
)
def test_example_runs(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(example, "README.md", tmp_path, monkeypatch)


LISTED = (ROOT / "docs" / "papers.md").read_text()
LINES = re.findall(r"\| `([^`]+)` \|$", LISTED, flags=re.MULTILINE)


@pytest.mark.backends("cpu")
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("line", LINES)
def test_line_of_a_paper_runs(line: str) -> None:
    names: dict[str, object] = {}
    exec(BLOCK.findall(LISTED)[0], names)
    eval(line, names)


DOCUMENTED = [
    pytest.param(page, example, id=f"{page.relative_to(ROOT)}-{i}")
    for page in PAGES
    for i, example in enumerate(BLOCK.findall(page.read_text()))
]


@pytest.mark.backends("cpu")
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("page", "example"), DOCUMENTED)
def test_documented_example_runs(page: Path, example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(example, page.name, tmp_path, monkeypatch)


def test_there_are_examples() -> None:
    shown = [README, *(page.read_text() for page in PAGES)]
    examples = [example for text in shown for example in BLOCK.findall(text)]
    for operator in {row.operator for row in _capability.table()}:
        assert any(operator in example for example in examples), operator


def test_table_is_the_capability_table() -> None:
    page = ROOT / "docs" / "attention" / "index.md"
    assert _capability.markdown() in page.read_text(), f"expected in {page}:\n" + _capability.markdown()


def test_some_examples_run_on_every_backend() -> None:
    assert sum(of_bfloat16(example) for example in EXAMPLES) >= 3


PUBLIC = [
    "attnx",
    "attnx.importance",
    "attnx.nn",
    "attnx.reference",
    "attnx.plot",
    "attnx.testing",
    "attnx.distributed",
]
MODULES = {"attnx.importance", "attnx.nn", "attnx.reference"}  # what has a page is what is in them
INTEGRATIONS = ["attnx.integrations.transformers", "attnx.integrations.diffusers"]  # they are read, not imported


@pytest.mark.parametrize("module", [*PUBLIC, *INTEGRATIONS])
def test_public_names_are_on_a_page(module: str) -> None:
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    documented = set(re.findall(r"^::: ([\w.]+)$", pages, flags=re.MULTILINE))
    init = ROOT / "python" / module.replace(".", "/") / "__init__.py"
    if module in INTEGRATIONS:
        names = re.findall(r'"(\w+)"', init.read_text().partition("__all__ = ")[2])
    else:
        names = importlib.import_module(module).__all__
    assert names
    missing = {f"{module}.{name}" for name in names} - documented - MODULES
    assert not missing, f"expected ::: {missing} on a page of docs/api"
    # Nothing is left of what went.
    gone = {x for x in documented if x.rpartition(".")[0] == module} - {f"{module}.{name}" for name in names}
    assert not gone
