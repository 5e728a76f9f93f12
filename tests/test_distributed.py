"""Attention over sequences and heads that several processes share, beside one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import distributed_worker

WORKER = Path(__file__).parent / "distributed_worker.py"
SIZES = (2, 4)


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """What failed, by the number of processes and the name of the check; all checks run in the same processes."""
    failed: dict[int, dict[str, str]] = {}
    for size in SIZES:
        folder = tmp_path_factory.mktemp(f"processes-{size}")
        command = [sys.executable, str(WORKER)]
        workers = [subprocess.Popen([*command, str(rank), str(size), str(folder)]) for rank in range(size)]
        try:
            codes = [worker.wait(timeout=240) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        assert codes == [0] * size
        failed[size] = {}
        for rank in range(size):
            for name, text in json.loads((folder / f"{rank}.json").read_text()).items():
                failed[size].setdefault(name, f"rank {rank}: {text}")
    return failed


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", distributed_worker.CHECKS)
def test_as_one_process(name: str, size: int, failures: dict[int, dict[str, str]]) -> None:
    if text := failures[size].get(name):
        pytest.fail(text, pytrace=False)
