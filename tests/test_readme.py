"""The README keeps its word: its examples run, its table is the capability table."""

import re
from pathlib import Path

import pytest

from attnx import _capability

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def of_bfloat16(example: str) -> bool:
    """Tells whether all random inputs are bfloat16, so that CUDA's kernels take the example."""
    return all("dtype=torch.bfloat16" in call for call in re.findall(r"torch\.randn\([^)]*\)", example))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "example",
    [pytest.param(x, marks=[] if of_bfloat16(x) else pytest.mark.needs("float32")) for x in EXAMPLES],
    ids=[example.strip().splitlines()[-1] for example in EXAMPLES],
)
def test_example_runs(example: str) -> None:
    exec(compile(example, "README.md", "exec"), {})


def test_there_are_examples() -> None:
    for operator in {row.operator for row in _capability.table()}:
        assert any(operator in example for example in EXAMPLES), operator


def test_table_is_the_capability_table() -> None:
    assert _capability.markdown() in README, "expected in README.md:\n" + _capability.markdown()


def test_some_examples_run_on_every_backend() -> None:
    assert sum(of_bfloat16(example) for example in EXAMPLES) >= 3
