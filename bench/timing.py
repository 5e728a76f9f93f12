"""Interleaved sampling, and what may be said about the samples."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rounds:
    """At least ``minimum`` rounds, and on to ``maximum`` while ``seconds`` have not passed."""

    minimum: int
    maximum: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """A value and the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def interleave(samplers: Mapping[str, Callable[[], float]], rounds: Rounds, seed: int = 0) -> dict[str, list[float]]:
    """Calls every sampler once a round, in an order shuffled anew each round, so that drift of the machine
    (clock, temperature, other load) meets all of them alike."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order, shuffle = list(samplers), random.Random(seed).shuffle
    start = time.perf_counter()
    for done in range(rounds.maximum):
        if done >= rounds.minimum and time.perf_counter() - start > rounds.seconds:
            break
        shuffle(order)
        for name in order:
            samples[name].append(samplers[name]())
    return samples


def speedup(baseline: Sequence[float], samples: Sequence[float], resamples: int = 2000) -> Estimate:
    """median(baseline) / median(samples), with a bootstrap interval that keeps the samples of a round together."""
    count = len(samples)
    chosen = np.random.default_rng(0).integers(count, size=(resamples, count))
    ratios = np.median(np.asarray(baseline)[chosen], axis=1) / np.median(np.asarray(samples)[chosen], axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return Estimate(float(np.median(baseline) / np.median(samples)), float(low), float(high))


def interquartile_range(samples: Sequence[float]) -> float:
    low, high = np.percentile(samples, (25, 75))
    return float(high - low)
