"""The build's own files: what they refuse, and what they must say alike."""

from __future__ import annotations

import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT, CMAKE = ((ROOT / name).read_text() for name in ("pyproject.toml", "CMakeLists.txt"))


def _has_cmake() -> bool:
    """Tells whether there is one of the least version, which the dev extra has."""
    least = re.search(r"cmake_minimum_required\(VERSION ([\d.]+)", CMAKE)
    assert least is not None
    if shutil.which("cmake") is None:
        return False
    text = subprocess.run(["cmake", "--version"], capture_output=True, text=True).stdout
    version, needed = (tuple(map(int, x.split(".")[:2])) for x in (text.split()[2], least[1]))
    return version >= needed


@pytest.mark.skipif(not _has_cmake(), reason="no cmake of the least version")
def test_unknown_options_are_refused(tmp_path: Path) -> None:
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DATTNX_CUDA=MAYBE"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ATTNX_CUDA: expected AUTO, ON or OFF, got MAYBE" in done.stderr


def test_one_least_version_of_cmake() -> None:
    versions = re.findall(r"cmake(?:_minimum_required\(VERSION |\.version = \">=|>=)([\d.]+)", CMAKE + PYPROJECT)
    assert len(versions) == 3
    assert len(set(versions)) == 1


def test_classifiers_name_the_least_python() -> None:
    named = re.findall(r"Python :: (3\.\d+)\"", PYPROJECT)
    least = re.search(r"requires-python = \">=([\d.]+)\"", PYPROJECT)
    assert least is not None
    assert named[0] == least[1]
    assert len(named) > 1


def test_pictures_go_where_the_readme_goes() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    excluded = re.search(r"sdist\.exclude = \[([^\]]*)\]", PYPROJECT)
    assert pictures
    assert excluded is not None
    patterns = re.findall(r'"([^"]+)"', excluded[1])
    assert not [x for x in pictures if any(fnmatch(x, pattern) for pattern in patterns)]
    assert all((ROOT / x).exists() for x in pictures)
