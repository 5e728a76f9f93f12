"""How much longer attention takes beside a busy process. ``python bench/under_load.py --help``

A process that never rests competes for the CPUs with the threads of torch. It is stopped and let go on in turn within
each round, so that both states meet the same drift of the machine. What is best: with two CPUs, three that want them
have two thirds each, so that a call that loses nothing but its share takes 1.5 times as long.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import attnx
from machine import facts
from suite import DIRECTIONS, DTYPES, Attention, Case, Direction, Inputs, Prepare
from suites import dense, sparse_linear
from timing import Rounds, speedup

CASES = tuple(Case(str(n), 4, n, n, 64) for n in (1024, 2048))
CONTENDERS: dict[str, Prepare] = {
    "attnx-sparse-linear": next(c for c in sparse_linear.SUITE.contenders if c.name == "attnx-sparse-linear").prepare,
    "attnx-softmax": lambda case, inputs: attnx.softmax_attention,
    "sdpa": dense.sdpa,
    "eager-softmax": dense.SOFTMAX.eager,
}
STATES = ("alone", "beside")
SETTLES = 0.02  # seconds after the other process was stopped or let go on


@contextlib.contextmanager
def competitor() -> Iterator[Callable[[str], None]]:
    """Gives a function that brings about one of the two states."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])

    def enter(state: str) -> None:
        process.send_signal(signal.SIGCONT if state == "beside" else signal.SIGSTOP)
        time.sleep(SETTLES)

    try:
        yield enter
    finally:
        process.kill()
        process.wait()


def _sample(attention: Attention, inputs: Inputs, direction: Direction) -> tuple[float, float]:
    """Seconds on the clock, and of all threads of this process."""
    clocks = time.perf_counter, time.process_time
    if direction == "forward":
        with torch.no_grad():
            start = [clock() for clock in clocks]
            attention(*inputs)
    else:
        leaves = Inputs(*(x.detach().requires_grad_() for x in inputs))
        output = attention(*leaves)
        projection = torch.ones_like(output)
        start = [clock() for clock in clocks]
        torch.autograd.grad(output, leaves, projection)
    end = [clock() for clock in clocks]
    return end[0] - start[0], end[1] - start[1]


def measure(
    case: Case, dtype: str, direction: Direction, rounds: Rounds, enter: Callable[[str], None]
) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """The samples of each contender in each state."""
    inputs = case.inputs(DTYPES[dtype], torch.device("cpu"))
    samplers = {
        name: functools.partial(_sample, prepare(case, inputs), inputs, direction)
        for name, prepare in CONTENDERS.items()
    }
    for sampler in samplers.values():  # warm-up
        sampler()
    samples: dict[str, dict[str, list[tuple[float, float]]]] = {
        name: {state: [] for state in STATES} for name in samplers
    }
    shuffle, start = random.Random(0).shuffle, time.perf_counter()
    for done in range(rounds.maximum):
        if done >= rounds.minimum and time.perf_counter() - start > rounds.seconds:
            break
        states, names = list(STATES), list(samplers)
        shuffle(states)
        for state in states:
            enter(state)
            shuffle(names)
            for name in names:
                samples[name][state].append(samplers[name]())
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"], help="(default: both)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each case and direction (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write JSON here, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rounds = Rounds(5, 200, arguments.seconds)
    table = Table(title=f"{arguments.threads} threads beside a busy process, 1 x 4 heads x 64")
    for header in ("dtype", "tokens", "direction", "attention", "ms alone", "ms beside", "times as long", "CPU time"):
        table.add_column(header, justify="left" if header in ("dtype", "direction", "attention") else "right")
    rows = []
    with competitor() as enter:
        for dtype in arguments.dtype or ["float32", "bfloat16"]:
            for case in CASES:
                for direction in DIRECTIONS:
                    for name, samples in measure(case, dtype, direction, rounds, enter).items():
                        (alone, cpu_alone), (beside, cpu_beside) = (np.array(samples[x]).T for x in STATES)
                        ratio = speedup(beside, alone)
                        table.add_row(
                            dtype,
                            case.name,
                            direction,
                            name,
                            f"{np.median(alone) * 1e3:.2f}",
                            f"{np.median(beside) * 1e3:.2f}",
                            f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
                            f"{np.median(cpu_beside) / np.median(cpu_alone):.2f}",
                        )
                        rows.append(
                            {"dtype": dtype, "length": case.length_q, "direction": direction, "attention": name}
                            | samples
                        )
                    table.add_section()
    Console(highlight=False, width=None if sys.stdout.isatty() else 130).print(table)
    if arguments.output:
        content = {"facts": facts(torch.device("cpu")), "rows": rows}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
