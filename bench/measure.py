"""What is measured: the ceiling, each contender's error, and its times beside the others'."""

from __future__ import annotations

import contextlib
import functools
import math
import textwrap
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from device import Device
from suite import DTYPES, Attention, Case, Contender, Direction, Inputs, Suite
from timing import Estimate, Rounds, interleave, interquartile_range, speedup

CHECKED_LENGTH = 512  # the errors are taken at no more than this many queries and keys


@dataclass(frozen=True)
class Accuracy:
    """Largest errors against float64, and the eager formula's in the same dtype: of the output, or of the gradient
    that compares worst."""

    error: float
    eager_error: float
    magnitude: float  # largest element of the float64 result
    epsilon: float

    @property
    def relative(self) -> float:
        """The error in units of the eager formula's."""
        if self.eager_error == 0:
            return math.inf if self.error > 0 else 0.0
        return self.error / self.eager_error

    @property
    def allowed(self) -> float:
        """Twice the eager formula's error, and the rounding of the result itself."""
        return 2 * self.eager_error + self.epsilon * self.magnitude

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # false for NaN


@dataclass
class Row:
    """One contender in one case, dtype and direction. Without samples it did not run, and ``reason`` says why."""

    case: Case
    dtype: str
    direction: Direction
    contender: str
    ours: bool
    reason: str | None = None
    accuracy: Accuracy | None = None
    samples: list[float] = field(default_factory=list)  # seconds
    speedup: Estimate | None = None  # over the suite's baseline
    ceiling: float = float("nan")  # FLOP/s of the fastest matrix product in this dtype

    @property
    def seconds(self) -> float:
        return float(np.median(self.samples))

    @property
    def spread(self) -> float:
        """Interquartile range in seconds."""
        return interquartile_range(self.samples)

    @property
    def flops_per_second(self) -> float:
        return self.case.flops(self.direction) / self.seconds

    @property
    def of_ceiling(self) -> float:
        return self.flops_per_second / self.ceiling

    @property
    def intensity(self) -> float:
        """FLOP per byte that cannot but be moved."""
        return self.case.flops(self.direction) / (self.case.elements(self.direction) * DTYPES[self.dtype].itemsize)

    @property
    def failed(self) -> bool:
        """Ours, and it did not run or its error is too large."""
        return self.ours and (not self.samples or self.accuracy is None or not self.accuracy.ok)


def ceiling(device: Device, dtype: str, rounds: Rounds) -> float:
    """FLOP/s of the fastest torch.mm over a few square sizes, in this dtype or, for a narrower one, in float32: not
    every CPU multiplies float16. The best sample counts, for a ceiling that other load lowers is none."""

    def product(size: int, dtype: torch.dtype) -> Callable[[], float]:
        a, b = (torch.randn(size, size, device=device.torch_device).to(dtype) for _ in range(2))
        return lambda: device.seconds(lambda: torch.mm(a, b))

    samplers: dict[str, Callable[[], float]] = {}
    flops: dict[str, float] = {}
    for candidate in {DTYPES[dtype], torch.promote_types(DTYPES[dtype], torch.float32)}:
        for size in device.matrix_sizes:
            sampler = product(size, candidate)
            samplers[f"{candidate} {size}"], flops[f"{candidate} {size}"] = sampler, 2.0 * size**3
            if sampler() > 0.5:  # seconds, and eight times that for the next size
                break
    return max(flops[name] / min(samples) for name, samples in interleave(samplers, rounds).items())


def bandwidth(device: Device, rounds: Rounds) -> float:
    """Bytes read and written a second by a copy within the device's memory; the best sample counts."""
    source = torch.empty(device.copy_bytes, dtype=torch.uint8, device=device.torch_device).random_()
    target = torch.empty_like(source)
    samples = interleave({"copy": lambda: device.seconds(lambda: target.copy_(source))}, rounds)
    return 2 * device.copy_bytes / min(samples["copy"])


def _results(attention: Attention, inputs: Inputs, direction: Direction) -> tuple[Tensor, ...]:
    """The output, or the gradients of a fixed random projection of it."""
    if direction == "forward":
        with torch.no_grad():
            return (attention(*inputs),)
    leaves = Inputs(*(x.detach().requires_grad_() for x in inputs))
    output = attention(*leaves)
    generator = torch.Generator().manual_seed(1)
    projection = torch.randn(output.shape, generator=generator).to(inputs.query).to(output.dtype)
    return torch.autograd.grad(output, leaves, projection)


def accuracy(contender: Contender, case: Case, dtype: str, direction: Direction, device: Device) -> Accuracy:
    case = case.shortened(CHECKED_LENGTH)
    inputs = case.inputs(DTYPES[dtype], device.torch_device)
    exact = Inputs(*(x.double() for x in inputs))
    formula = contender.formula
    worst = []
    for result, eager, reference in zip(
        _results(contender.prepare(case, inputs), inputs, direction),
        _results(formula.eager(case, inputs), inputs, direction),
        _results(formula.reference(case, exact), exact, direction),
        strict=True,
    ):
        error, eager_error = ((x.double() - reference).abs().max().item() for x in (result, eager))
        magnitude, epsilon = reference.abs().max().item(), torch.finfo(DTYPES[dtype]).eps
        worst.append(Accuracy(error, eager_error, magnitude, epsilon))
    # NaN compares as smaller than everything, but is the worst there is.
    return max(worst, key=lambda a: (math.isnan(a.relative), a.relative))


def _sampler(attention: Attention, inputs: Inputs, direction: Direction, device: Device) -> Callable[[], float]:
    if direction == "forward":

        def forward() -> float:
            with torch.no_grad():
                return device.seconds(lambda: attention(*inputs))

        return forward

    leaves = Inputs(*(x.detach().requires_grad_() for x in inputs))

    def backward() -> float:
        output = attention(*leaves)  # a fresh graph each time, untimed
        projection = torch.ones_like(output)
        return device.seconds(lambda: torch.autograd.grad(output, leaves, projection))

    return backward


@contextlib.contextmanager
def _mode(contender: Contender) -> Iterator[None]:
    if not contender.deterministic:
        yield
        return
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # a help to find bugs, not part of the algorithms
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _sample(sampler: Callable[[], float], contender: Contender) -> float:
    with _mode(contender):
        return sampler()


def explain(error: BaseException) -> str:
    """The first line of the error at the root of the chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = textwrap.shorten(str(error).strip().partition("\n")[0], 200, placeholder=" ...")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def measure(
    suite: Suite,
    contenders: Collection[Contender],
    case: Case,
    dtype: str,
    direction: Direction,
    device: Device,
    ceiling: float,
    rounds: Rounds,
) -> list[Row]:
    """One row per contender: first its error, then its times, interleaved with the others'."""
    inputs = case.inputs(DTYPES[dtype], device.torch_device)
    rows, samplers = [], {}
    for contender in contenders:
        row = Row(case, dtype, direction, contender.name, contender.ours, ceiling=ceiling)
        rows.append(row)
        try:
            sampler = functools.partial(
                _sample, _sampler(contender.prepare(case, inputs), inputs, direction, device), contender
            )
            with _mode(contender):
                row.accuracy = accuracy(contender, case, dtype, direction, device)
            sampler()  # warm-up; compiles where something is compiled
        except Exception as error:  # whatever stops a contender becomes its row's reason
            row.reason = explain(error)
        else:
            samplers[contender.name] = sampler
    for name, samples in interleave(samplers, rounds).items():
        row = next(row for row in rows if row.contender == name)
        row.samples = samples
    baseline = next((row for row in rows if row.contender == suite.baseline), None)
    if baseline and baseline.samples:
        for row in rows:
            row.speedup = speedup(baseline.samples, row.samples) if row.samples else None
    return rows
