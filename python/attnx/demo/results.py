"""What a run found, ready for the table, the plot and the JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any


@dataclass
class AttentionResult:
    """Of one attention; None or empty is what an interrupted run did not come to."""

    name: str
    label: str
    largest_error: float
    training_bits_per_byte: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    validation_bits_per_byte: float | None = None
    forward_seconds: list[float] = field(default_factory=list)

    @property
    def ms_per_step(self) -> float | None:
        return _median_ms(self.step_seconds)

    @property
    def forward_ms(self) -> float | None:
        return _median_ms(self.forward_seconds)


@dataclass
class CacheResult:
    """Of decoding with one cache."""

    name: str
    label: str
    bits_per_byte: float
    bits: float  # of a number, on average over what the queries read
    bytes_per_token: float  # of all layers, with the ranges
    text: str  # generated


@dataclass
class GenerationResult:
    """Of ``model.generate`` with one cache."""

    label: str
    seconds: float
    text: str


@dataclass
class Results:
    config: dict[str, Any]
    environment: dict[str, Any]
    attentions: list[AttentionResult]
    baseline_forward_seconds: list[float] = field(default_factory=list)
    caches: list[CacheResult] = field(default_factory=list)  # none where no softmax was trained
    generation: list[GenerationResult] = field(default_factory=list)  # none without transformers
    interrupted: bool = False
    seconds: float = 0.0

    def forward_speed(self, result: AttentionResult) -> float | None:
        """How many times as fast as scaled_dot_product_attention."""
        baseline = _median_ms(self.baseline_forward_seconds)
        return baseline / result.forward_ms if baseline and result.forward_ms else None

    def save(self, path: Path) -> None:
        content = asdict(self)
        for entry, result in zip(content["attentions"], self.attentions, strict=True):
            entry["ms_per_step"] = result.ms_per_step
            entry["forward_ms"] = result.forward_ms
            entry["forward_speed_over_sdpa"] = self.forward_speed(result)
        path.write_text(json.dumps(content, indent=1) + "\n")


def _median_ms(seconds: list[float]) -> float | None:
    return 1e3 * median(seconds) if seconds else None
