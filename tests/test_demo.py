"""``python -m attnx`` from outside, as people run it, and the parts of it that can go wrong on their own."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from attnx.demo.corpus import consecutive_windows, random_windows

MODULE = [sys.executable, "-m", "attnx"]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def trains(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test of the training, which is in float32."""
    return pytest.mark.usefixtures("backend")(pytest.mark.needs("float32")(test))


def attnx(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MODULE, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)


def load_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


@trains
def test_a_short_run_ends_with_the_table_and_the_report(tmp_path: Path) -> None:
    # Few windows to validate on: decoding them byte by byte is what takes longest.
    (tmp_path / "own.txt").write_text("to be or not to be, " * 600)
    run = attnx("--steps", "2", "--threads", "2", "--seed", "3", "--text", "own.txt", folder=tmp_path)
    assert run.returncode == 0, run.stderr
    report = load_report(tmp_path / "attnx-report")
    assert (tmp_path / "attnx-report" / "report.png").read_bytes().startswith(PNG_SIGNATURE)
    assert not report["interrupted"]
    assert report["config"]["training"]["seed"] == 3
    assert report["environment"]["machine"]["threads"] == 2
    names = [result["name"] for result in report["attentions"]]
    assert names == ["sdpa", "softmax", "sigmoid", "sparse-linear", "probabilistic", "routing"]
    for result in report["attentions"]:
        assert result["label"] in run.stdout
        assert len(result["training_bits_per_byte"]) == len(result["step_seconds"]) == 2
        assert 0 < result["validation_bits_per_byte"] < 8.5
        assert 0 < result["largest_error"] < 1e-5
        assert result["forward_ms"] > 0
    full, staircase, requantised = report["caches"]
    assert (full["name"], staircase["name"], requantised["name"]) == ("full", "staircase", "requantised")
    assert staircase["bits"] == requantised["bits"] < 3.5 < full["bits"] == 32
    assert staircase["bits_per_byte"] == pytest.approx(full["bits_per_byte"], rel=0.01)
    assert staircase["bytes_per_token"] < full["bytes_per_token"] / 6
    assert "staircase 16-8-4-2 writes:" in run.stdout
    if importlib.util.find_spec("transformers") is None:
        assert "transformers is not installed: pip install 'attnx[transformers]'" in " ".join(run.stdout.split())
        assert report["generation"] == []
    else:
        assert [x["label"] for x in report["generation"]] == ["in full", "staircase"]
    # The same model on the same batches: the two softmaxes differ by rounding alone.
    sdpa, softmax, *_ = (result["training_bits_per_byte"] for result in report["attentions"])
    assert softmax == pytest.approx(sdpa, abs=1e-4)


@trains
def test_own_text_device_and_attention(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("to be or not to be, " * 600)
    run = attnx(
        "--steps=1", "--text=own.txt", "--attention=sigmoid", "--device=cpu", "--output=here/there", folder=tmp_path
    )
    assert run.returncode == 0, run.stderr
    report = load_report(tmp_path / "here" / "there")
    assert report["config"]["text"] == "own.txt"
    (result,) = report["attentions"]
    assert result["name"] == "sigmoid"
    assert result["forward_speed_over_sdpa"] > 0


@trains
def test_interrupt_ends_with_what_was_done(tmp_path: Path) -> None:
    environment = {**os.environ, "FORCE_COLOR": "1", "PYTHONUNBUFFERED": "1"}  # rich then redraws its bars
    with subprocess.Popen(
        [*MODULE, "--steps", "100000", "--attention", "sdpa"], cwd=tmp_path, stdout=subprocess.PIPE, env=environment
    ) as process:
        deadline = time.monotonic() + 120
        assert process.stdout is not None
        while b"tokens/s" not in process.stdout.read1() and time.monotonic() < deadline:
            pass
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    assert process.returncode == 130
    report = load_report(tmp_path / "attnx-report")
    (result,) = report["attentions"]
    assert report["interrupted"]
    assert result["forward_ms"] is None
    assert 0 < len(result["training_bits_per_byte"]) < 100000
    assert result["validation_bits_per_byte"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attention", "linear"], "argument --attention: invalid choice: 'linear' (choose from"),
        (["--steps", "0"], "argument --steps: expected a positive number, got 0"),
        (["--text", "missing.txt"], "--text: expected a readable file, got missing.txt (No such file or directory)"),
        (["--text", "short.txt"], "--text: expected at least 5130 bytes, got 5 in short.txt"),
        (
            ["--output=short.txt", "--attention=sdpa"],
            "--output: expected a folder that can be written, got short.txt (File exists)",
        ),
        (["--device", "abacus"], "--device: expected one that torch can use here, got 'abacus'"),
        (["--device", "meta"], "--device: expected one that PyTorch softmax runs on, got meta ("),
    ],
)
def test_refuses(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short")
    run = attnx(*arguments, folder=tmp_path)
    assert run.returncode != 0
    assert message in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "attnx-report").exists()


@pytest.mark.parametrize("extra", ["rich", "matplotlib"])
def test_names_the_extra_that_is_missing(extra: str, tmp_path: Path) -> None:
    code = (
        f"import runpy, sys; sys.modules[{extra!r}] = None; sys.argv = ['attnx']; "
        "runpy.run_module('attnx', run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1
    assert run.stderr == f"python -m attnx: needs {extra}, which is not installed: pip install 'attnx[demo]'\n"


def test_importing_attnx_leaves_the_demo_alone() -> None:
    code = "import sys, attnx; print(*({'rich', 'matplotlib', 'attnx.demo', 'attnx.info'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300).stdout == "\n"


def test_info(tmp_path: Path) -> None:
    facts = json.loads(attnx("info", "--json", folder=tmp_path).stdout)
    assert facts["machine"]["torch"] == torch.__version__
    assert facts["machine"]["cpu_instruction_set_in_use"] in facts["machine"]["cpu_instruction_sets"]
    assert set(facts["machine"]["cpu_instruction_sets"]) <= set(facts["build"]["cpu_instruction_sets"])
    cpu_kernels = {row["operator"]: row["kernel"] for row in facts["kernels"] if row["backend"] == "cpu"}
    assert facts["machine"]["cpu_instruction_set_in_use"] in cpu_kernels["sigmoid_attention"]
    text = attnx("info", folder=tmp_path).stdout
    assert all(operator in text for operator in cpu_kernels)


@trains
def test_generates_from_two_caches() -> None:
    """What the model has learned, it writes from either cache."""
    pytest.importorskip("transformers")
    from attnx.demo.corpus import Corpus
    from attnx.demo.generation import GENERATED, generate
    from attnx.demo.model import ModelConfig

    text = torch.tensor(list(b"to be or not to be, " * 200), dtype=torch.uint8)
    done: list[int] = []
    config = ModelConfig(layers=4, width=64, heads=2)
    results = generate(Corpus("own", text, text), config, 0, torch.device("cpu"), lambda: done.append(1), steps=100)
    assert len(done) == 102
    in_full, staircase = (result.text for result in results)
    assert len(in_full) == len(staircase) == GENERATED
    assert in_full[:40] == staircase[:40]
    assert in_full[:20] in "to be or not to be, " * 3


def test_windows() -> None:
    data = torch.arange(23, dtype=torch.uint8)
    windows = consecutive_windows(data, context=5)
    assert windows[:, 1:].flatten().tolist() == list(range(1, 21))
    assert torch.equal(windows[1:, 0], windows[:-1, -1])
    drawn = random_windows(data, 1000, 6, torch.Generator().manual_seed(0))
    assert (drawn.diff() == 1).all()
    assert drawn.min() == 0
    assert drawn.max() == 22
