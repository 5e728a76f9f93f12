"""Type checkers understand the calls of typed_calls.py, and what is wrong in them."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import attnx

pytestmark = pytest.mark.types

TYPED = Path(__file__).parent / "typed_calls.py"
CHECKERS = {
    "mypy": [sys.executable, "-m", "mypy", "--config-file=", "--no-error-summary"],
    "pyright": ["pyright", "--pythonpath", sys.executable],
}


def check(checker: str, text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The package lies where a user has it: installed, beside no configuration of ours."""
    file = folder / "calls.py"
    file.write_text(text)
    (folder / "attnx").symlink_to(Path(attnx.__file__).parent)
    return subprocess.run([*CHECKERS[checker], str(file)], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("checker", CHECKERS)
def test_calls(checker: str, tmp_path: Path) -> None:
    there = importlib.util.find_spec("mypy") if checker == "mypy" else shutil.which("pyright")
    if not there:
        pytest.skip(f"{checker} is not installed")
    text = TYPED.read_text()
    wrong = (
        "attnx.softmax_attention(q, k, v, is_casual=True)",
        "attnx.block_sparse_attention(q, k, v, mask, return_logsumexp=True).sum()",
    )
    result = check(checker, "\n".join((text, *wrong, "")), tmp_path)
    errors = [line for line in result.stdout.splitlines() if "calls.py" in line and "error" in line]
    lines = len(text.splitlines())
    assert errors, result.stdout + result.stderr
    assert {int(line.split(":")[1]) for line in errors} == {lines + 2, lines + 3}, result.stdout + result.stderr
