"""Calls torch.ops.attnx.* with arguments that no function of the package would pass on.

A call is a valid one of which hypothesis replaces a few arguments: by extremes, by numbers that are not finite, by
tensors of another shape, dtype, layout or device. An operator may refuse it or serve it. It may not crash, so that
calls are made in processes of their own: one that dies names the call that it died in.

    python tests/fuzz_operators.py --calls 100000 [--seed 1] [--operator sparse_linear_labels]
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnx._operators.schema import Arguments, signature
from operator_calls import NAMES, valid_calls

REFUSALS = (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, MemoryError)
MEMORY = 4 << 30  # beyond what a process has before the calls: what an absurd size asks for fails at once
CALLS_OF_PROCESS = 2000

INTEGERS = [0, 1, -1, 2, 31, 32, 63, 64, 65, 127, 128, 129, 1000]
INTEGERS += [
    s * 2**n + d for n in (31, 32, 53, 62, 63) for s in (1, -1) for d in (-1, 0) if -(2**63) <= s * 2**n + d < 2**63
]
FLOATS = [0.0, -0.0, 0.5, 1.0, -1.0, 2.0, 1e-320, 1e39, -1e39, 1e308, math.nan, math.inf, -math.inf]
WORDS = [
    "",
    "softmax",
    "sigmoid",
    "none",
    "row",
    "length",
    "topk",
    "argmax",
    "elu",
    "relu",
    "all",
    "marginal",
    "\0",
    "é",
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.int8, torch.bool]
DTYPES += [torch.uint8, torch.int16, torch.complex64, torch.float8_e4m3fn]


def _extreme(x: Tensor, draw: Any) -> Tensor:
    """It has the same shape and dtype, and an extreme number everywhere or in one place."""
    if x.dtype.is_floating_point or x.dtype.is_complex:
        number = torch.tensor(draw(st.sampled_from(FLOATS)), dtype=torch.float64).to(x.dtype)
    elif x.dtype == torch.bool:
        number = draw(st.booleans())
    else:
        limits = torch.iinfo(x.dtype)
        number = min(max(draw(st.sampled_from(INTEGERS)), limits.min), limits.max)
    x = x.clone(memory_format=torch.contiguous_format)
    if x.numel() > 0 and draw(st.booleans()):
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = number
        return x
    return x.copy_(torch.as_tensor(number).expand(x.shape))


def _reshaped(x: Tensor, draw: Any) -> Tensor:
    if x.dim() == 0:
        return x.expand(draw(st.sampled_from([(1,), (0,), (2, 3)])))
    d = draw(st.integers(0, x.dim() - 1))
    kind = draw(st.sampled_from(["empty", "shorter", "longer", "one", "rank+", "rank-", "scalar", "flat"]))
    if kind == "empty":
        return x.narrow(d, 0, 0)
    if kind == "shorter":
        return x.narrow(d, 0, max(x.shape[d] - 1, 0))
    if kind == "longer":
        return torch.cat((x, x), d)
    if kind == "one":
        return x.narrow(d, 0, min(x.shape[d], 1))
    if kind == "rank+":
        return x.unsqueeze(d)
    if kind == "rank-":
        return x.select(d, 0) if x.shape[d] else x.sum(d).to(x.dtype)
    return x.flatten() if kind == "flat" else x.new_zeros(())


def _laid_out(x: Tensor, draw: Any) -> Tensor:
    """The same numbers in other strides, or some of them for all."""
    kind = draw(st.sampled_from(["transposed", "strided", "expanded", "sparse", "meta"]))
    if kind == "meta":
        return x.to("meta")
    if kind == "sparse" and x.dtype != torch.float8_e4m3fn:
        return x.to_sparse()
    if x.dim() == 0 or x.numel() == 0:
        return x
    d = draw(st.integers(0, x.dim() - 1))
    if kind == "transposed":
        return x.transpose(d, -1).contiguous().transpose(d, -1)
    if kind == "strided":
        return x.repeat_interleave(2, d).unflatten(d, (-1, 2)).select(d + 1, 0)
    return x.narrow(d, 0, 1).expand(x.shape)


def _hostile_tensor(x: Tensor | None, draw: Any) -> Tensor | None:
    if x is None:
        return draw(
            st.sampled_from([None, torch.zeros(()), torch.zeros(4), torch.zeros(1, 1, 1, 1, dtype=torch.int32)])
        )
    for change in draw(st.lists(st.sampled_from(["extreme", "shape", "layout", "dtype"]), min_size=1, max_size=2)):
        if x.is_meta or x.is_sparse:
            break
        if change == "extreme":
            x = _extreme(x, draw)
        elif change == "shape":
            x = _reshaped(x, draw)
        elif change == "layout":
            x = _laid_out(x, draw)
        else:
            x = x.to(draw(st.sampled_from(DTYPES)))
    return x


def _hostile(kind: str, x: Any, draw: Any) -> Any:
    if "Tensor" in kind:
        return _hostile_tensor(x, draw)
    if kind in ("int", "SymInt"):
        return draw(st.sampled_from(INTEGERS) | st.integers(-(2**63), 2**63 - 1) | st.integers(x - 2, x + 2))
    if kind in ("float", "Optional[float]"):
        return draw(st.sampled_from(FLOATS) | st.floats())
    if kind == "List[int]":
        return draw(st.lists(st.sampled_from([1, 2, 4, 8, 16, *INTEGERS]), max_size=40))
    return draw(st.booleans()) if kind == "bool" else draw(st.sampled_from(WORDS))


def hostile_call(name: str, draw: Any) -> Arguments:
    valid = valid_calls()[name]
    arguments = dict(valid[draw(st.integers(0, len(valid) - 1))])
    schema = signature(name).operator._schema.arguments
    for i in draw(st.lists(st.integers(0, len(schema) - 1), min_size=1, max_size=3, unique=True)):
        x = schema[i]
        arguments[x.name] = _hostile(str(x.type), arguments[x.name], draw)
    return {key: x.clone() if key in signature(name).written and x is not None else x for key, x in arguments.items()}


def describe(x: Any) -> str:
    if not isinstance(x, Tensor):
        return repr(x)
    values = f" {x.flatten()[:8].tolist()}" if not (x.is_meta or x.is_sparse) else ""
    strides = "" if x.is_sparse else f" strides {tuple(x.stride())}"
    return f"{x.dtype} {tuple(x.shape)}{strides} {x.device}{values}"


@dataclasses.dataclass
class Report:
    calls: int = 0
    served: int = 0
    refused: int = 0
    unexpected: list[str] = dataclasses.field(default_factory=list)  # errors that are no refusal


def work(log: Path, names: list[str], calls: int, seed: int, before_each_call: str) -> Report:
    """Makes the calls, each of which is in the log before it is made."""
    valid_calls()
    warnings.simplefilter("ignore")  # torch's, of conversions
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    if not os.environ.get("ATTNX_FUZZ_ANY_MEMORY"):  # a sanitizer maps more than any limit
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    report = Report()

    @hypothesis.seed(seed)
    @settings(
        max_examples=calls,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(names))
        arguments = hostile_call(name, data.draw)
        text = "\n  ".join([name, *(f"{key} = {describe(x)}" for key, x in arguments.items())])
        log.write_text(text)
        report.calls += 1
        try:
            exec(before_each_call)
            signature(name).call(arguments)
            report.served += 1
        except REFUSALS:
            report.refused += 1
        except Exception as error:
            report.unexpected.append(f"{text}\n{type(error).__name__}: {error}")

    run()
    return report


@dataclasses.dataclass
class Fuzz:
    """What came of all processes."""

    report: Report
    failures: list[str]
    seconds: float


def fuzz(
    calls: int,
    seed: int = 0,
    operators: Sequence[str] = NAMES,
    timeout: float = 600,  # of a process
    before_each_call: str = "",  # what tests of the fuzz have run
) -> Fuzz:
    total, failures, start = collections.Counter(), [], time.monotonic()
    for first in range(0, calls, CALLS_OF_PROCESS):
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder, "call")
            part = min(CALLS_OF_PROCESS, calls - first)
            command = [sys.executable, __file__, "--worker", str(log), "--calls", str(part), "--seed", str(seed)]
            command += ["--before-each-call", before_each_call]
            for name in operators:
                command += ["--operator", name]
            seed += 1
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
            except subprocess.TimeoutExpired:
                failures.append(f"seed {seed - 1}: no answer within {timeout} s\n{log.read_text()}")
                continue
            if done.returncode == 0:
                part_of_all = json.loads(done.stdout.splitlines()[-1])
                failures += part_of_all.pop("unexpected")
                total.update(part_of_all)
                continue
            code = done.returncode
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            failures.append(f"seed {seed - 1}: {how}\n{log.read_text() if log.exists() else ''}\n{done.stderr[-3000:]}")
    return Fuzz(Report(**total), failures, time.monotonic() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=CALLS_OF_PROCESS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--operator", action="append", choices=NAMES, help="only these; all by default")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--before-each-call", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    operators = args.operator or NAMES
    if args.worker:
        torch.set_num_threads(2)
        print(
            json.dumps(dataclasses.asdict(work(args.worker, operators, args.calls, args.seed, args.before_each_call)))
        )
        return 0
    done = fuzz(args.calls, args.seed, operators)
    print("\n\n".join(done.failures))
    x = done.report
    print(
        f"{x.calls} calls of {len(operators)} operators in {done.seconds:.0f} s: {x.served} served, {x.refused} refused"
    )
    print(f"{len(done.failures)} failures")
    return bool(done.failures)


if __name__ == "__main__":
    sys.exit(main())
