"""The trained softmax model decodes with its keys and values in three caches: in full, as a staircase, and
requantised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import attnx
from attnx.demo.corpus import Corpus, consecutive_windows
from attnx.demo.measure import kernel_dtype
from attnx.demo.model import ModelConfig, Transformer
from attnx.demo.results import CacheResult

LEVELS, WINDOW, GROUP = (16, 8, 4, 2), 32, 32  # the model's context is short
DTYPE = torch.bfloat16  # of what is not quantised
PROMPT, GENERATED, TEMPERATURE = 128, 160, 0.7
LARGEST_BATCH = 48  # windows of held-out text


class Cache(Protocol):
    """Of one layer; all sequences have the same length."""

    def append(self, key: Tensor, value: Tensor) -> None: ...
    def attend(self, query: Tensor) -> Tensor: ...
    def bits(self) -> Tensor:
        """(length,): of each token's numbers."""
        ...


class FullCache:
    def __init__(self, batch: int, heads: int, head_dim: int, max_length: int, device: torch.device) -> None:
        shape = 2, batch, heads, max_length, head_dim
        self.key, self.value = torch.empty(shape, dtype=kernel_dtype(device), device=device).unbind(0)
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> None:
        end = self.length + key.shape[2]
        self.key[:, :, self.length : end], self.value[:, :, self.length : end] = key, value
        self.length = end

    def attend(self, query: Tensor) -> Tensor:
        key, value = self.key[:, :, : self.length], self.value[:, :, : self.length]
        output = attnx.softmax_attention(query.to(key.dtype), key, value, is_causal=True)
        assert isinstance(output, Tensor)
        return output.float()

    def bits(self) -> Tensor:
        return torch.full((self.length,), 8 * self.key.element_size())


class Staircase:
    def __init__(self, batch: int, heads: int, head_dim: int, max_length: int, device: torch.device) -> None:
        layout: dict[str, Any] = {"levels": LEVELS, "window": WINDOW, "group": GROUP}
        self.cache = attnx.StaircaseCache(batch, heads, head_dim, max_length, **layout, dtype=DTYPE, device=device)

    def append(self, key: Tensor, value: Tensor) -> None:
        self.cache.append(key.to(DTYPE), value.to(DTYPE))

    def attend(self, query: Tensor) -> Tensor:
        output = self.cache.attend(query.to(DTYPE))
        assert isinstance(output, Tensor)
        return output.float()

    def bits(self) -> Tensor:
        return self.cache.bits()


class RequantisedCache(FullCache):
    """The same staircase as the paper has it: at each step what a window was quantised to is quantised again, to the
    nearest of fewer levels between its minimum and maximum. It holds the numbers, not the codes."""

    def append(self, key: Tensor, value: Tensor) -> None:
        for k, v in zip(key.to(DTYPE).split(1, 2), value.to(DTYPE).split(1, 2), strict=True):
            super().append(k, v)
            if self.length % WINDOW == 0:
                self._fall()

    def _fall(self) -> None:
        full = self.length // WINDOW
        for age in range(1, min(full, len(LEVELS) - 1) + 1):
            window = slice((full - age) * WINDOW, (full - age + 1) * WINDOW)
            self.key[:, :, window] = _nearest(self.key[:, :, window].mT, LEVELS[age]).mT
            self.value[:, :, window] = _nearest(self.value[:, :, window], LEVELS[age])

    def bits(self) -> Tensor:
        age = self.length // WINDOW - torch.arange(self.length) // WINDOW
        return torch.tensor(LEVELS)[age.clamp(max=len(LEVELS) - 1)]


def _nearest(x: Tensor, bits: int) -> Tensor:
    x = x.unflatten(-1, (-1, GROUP))
    low, high = x.amin(-1, True), x.amax(-1, True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-30)
    return (low + ((x - low) / step).round() * step).flatten(-2)


@dataclass(frozen=True)
class _Kind:
    name: str
    label: str  # {dtype} stands for that of the kernels
    build: Callable[..., Cache]


KINDS = (
    _Kind("full", "full, {dtype}", FullCache),
    _Kind("staircase", f"staircase {'-'.join(map(str, LEVELS))}", Staircase),
    _Kind("requantised", "requantised to nearest", RequantisedCache),
)


@torch.no_grad()
def compare_caches(
    model: Transformer, config: ModelConfig, corpus: Corpus, seed: int, on_step: Callable[[], object]
) -> list[CacheResult]:
    """Bits per byte of held-out text, decoded byte by byte after a first half that is taken in at once, and text
    generated after the beginning of it. ``on_step`` is called ``steps(config)`` times."""
    device = model.head.weight.device
    windows = held_out(corpus, config).to(device)
    prompt = plain_text(windows)
    model.eval()
    results = []
    for kind in KINDS:

        def caches(batch: int, build: Any = kind.build) -> list[Cache]:
            head_dim = config.width // config.heads
            return [build(batch, config.heads, head_dim, config.context, device) for _ in model.blocks]

        bits_per_byte, kept, ranges = _decode(model, caches(len(windows)), windows, on_step)
        text = _generate(model, caches(1), prompt, seed, on_step)
        numbers = 2 * config.layers * config.width
        bytes_per_token = numbers * (kept / 8 + (0 if kind.name == "full" else ranges))
        label = kind.label.format(dtype=str(kernel_dtype(device)).removeprefix("torch."))
        results.append(CacheResult(kind.name, label, bits_per_byte, kept, bytes_per_token, text))
    model.train()
    return results


def held_out(corpus: Corpus, config: ModelConfig) -> Tensor:
    return consecutive_windows(corpus.validation, config.context)[:LARGEST_BATCH]


def plain_text(windows: Tensor) -> Tensor:
    """(1, PROMPT): the beginning of the window that has most letters."""
    letters = (windows[:, :PROMPT] >= ord("a")) & (windows[:, :PROMPT] <= ord("z"))
    return windows[letters.sum(1).argmax(), None, :PROMPT]


def steps(config: ModelConfig) -> int:
    return len(KINDS) * (config.context // 2 + GENERATED)


def _decode(
    model: Transformer, caches: list[Cache], windows: Tensor, on_step: Callable[[], object]
) -> tuple[float, float, float]:
    """Bits per byte, and of what the queries read: the mean bits of a number, and the mean bytes of its range."""
    half = windows.shape[1] // 2
    model.decode(windows[:, :half], 0, caches)
    total = bits = quantised = count = 0.0
    for t in range(half, windows.shape[1] - 1):
        logits = model.decode(windows[:, t : t + 1], t, caches)[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, windows[:, t + 1])
        total += loss.item() / torch.tensor(2.0).log().item()
        held = caches[0].bits()
        bits, count = bits + held.sum().item(), count + len(held)
        quantised += len(held) // WINDOW * WINDOW
        on_step()
    return total / (windows.shape[1] - 1 - half), bits / count, 4 / GROUP * quantised / count


def _generate(model: Transformer, caches: list[Cache], prompt: Tensor, seed: int, on_step: Callable[[], object]) -> str:
    generator = torch.Generator().manual_seed(seed)
    logits, length, text = model.decode(prompt, 0, caches), prompt.shape[1], b""
    for t in range(length, length + GENERATED):
        byte = torch.multinomial((logits[:, -1] / TEMPERATURE).softmax(-1).cpu(), 1, generator=generator)
        text += bytes([int(byte)])
        logits = model.decode(byte.to(prompt.device), t, caches)
        on_step()
    return text.decode(errors="replace")
