"""The text to learn: bytes, the last tenth of them for validation."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from attnx.demo import DemoError

VALIDATION_FRACTION = 0.1


class Corpus(NamedTuple):
    name: str
    train: Tensor  # (bytes,) uint8
    validation: Tensor


def load_corpus(path: Path | None, context: int) -> Corpus:
    """Reads ``path``, or the help topics of Python's own documentation, which every installation carries.

    Raises:
        DemoError: the file cannot be read, or is too short for one window of ``context`` bytes to validate on.
    """
    name, text = (str(path), _read(path)) if path else ("pydoc_data.topics", _help_topics())
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    validation = int(len(data) * VALIDATION_FRACTION)
    if validation < context + 1:
        needed = round((context + 1) / VALIDATION_FRACTION)
        raise DemoError(f"--text: expected at least {needed} bytes, got {len(data)} in {name}")
    return Corpus(name, data[:-validation], data[-validation:])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DemoError(f"--text: expected a readable file, got {path} ({error.strerror})") from error


def _help_topics() -> bytes:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def random_windows(data: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, size) int64: windows of ``data`` that start anywhere."""
    start = torch.randint(len(data) - size + 1, (count, 1), generator=generator)
    return data[start + torch.arange(size)].long()


def consecutive_windows(data: Tensor, context: int) -> Tensor:
    """(windows, context + 1) int64: every byte but the first is predicted once; what does not fill a window is left."""
    return data.unfold(0, context + 1, context).long()
