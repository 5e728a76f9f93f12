"""Attention over sequences and heads that several processes share, beside one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnx.distributed
from backends import Backend
from distributed_worker import checks_for

pytestmark = pytest.mark.xdist_group("distributed")  # the processes are started once
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
            codes = [worker.wait(timeout=600) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        assert codes == [0] * size
        failed[size] = {}
        for rank in range(size):
            for name, text in json.loads((folder / f"{rank}.json").read_text()).items():
                failed[size].setdefault(name, f"rank {rank}: {text}")
    return failed


@pytest.mark.backends("cpu")  # gloo carries what lies in host memory
@pytest.mark.parametrize(("size", "name"), [(size, name) for size in SIZES for name in checks_for(size)])
def test_as_one_process(size: int, name: str, backend: Backend, failures: dict[int, dict[str, str]]) -> None:
    if text := failures[size].get(name):
        pytest.fail(text, pytrace=False)


def test_a_group_comes_first() -> None:
    x = torch.ones(1, 2, 4, 8)
    with pytest.raises(RuntimeError, match=r"^group: expected torch.distributed.init_process_group before"):
        attnx.distributed.ring_softmax_attention(x, x, x)


WITHOUT = {
    "register_sharding": attnx.distributed.register_sharding,
    "context_parallel": attnx.distributed.context_parallel(None, buffers=[], buffer_seq_dims=[]).__enter__,
}


@pytest.mark.parametrize("name", WITHOUT)
def test_torch_without_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.distributed.tensor.experimental, name)
    with pytest.raises(NotImplementedError, match=f"^{name}: expected a torch that has torch.distributed.tensor.expe"):
        WITHOUT[name]()
