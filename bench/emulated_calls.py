"""These calls together launch every CUDA kernel on an emulator of the CUDA runtime; it prints a line of JSON a launch.

emulation.py runs this in a process of its own, for the emulator is loaded when a process starts. The emulator appends a
profile of each launch to the file CUDAEMU_PROFILE; this adds which call the launch belongs to.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import attnx

Score = Literal["sigmoid", "softmax"]
_BLOCK = 64  # the least queries and keys of a listed block


@dataclass(frozen=True)
class Call:
    score: Score
    dtype: str
    head_dim: int
    rows: int
    keys: int
    backward: bool = False
    block_size: tuple[int, int] | None = None  # of lists
    parameters: tuple[str, ...] = ()  # of a head; in a backward they get gradients
    block_bias: bool = False  # of lists; in a backward it gets gradients

    def run(self) -> None:
        """Runs on constant inputs, whose counts are the same everywhere: a row's maximum rises in its first tile."""
        query, key, value = (
            torch.ones(1, 1, length, self.head_dim, dtype=getattr(torch, self.dtype), requires_grad=self.backward)
            for length in (self.rows, self.keys, self.keys)
        )
        parameters = {name: torch.zeros(1, requires_grad=self.backward) for name in self.parameters}
        if self.block_size:
            block_q, block_k = self.block_size
            every = torch.ones(1, 1, self.rows // block_q, self.keys // block_k, dtype=torch.bool)
            lists = attnx.BlockMask.from_dense(every, self.block_size)
            if self.block_bias:
                parameters["block_bias"] = torch.zeros(lists.kv_indices.shape, requires_grad=self.backward)
            output = attnx.block_sparse_attention(query, key, value, lists, score=self.score, **parameters)
        else:
            output = getattr(attnx, f"{self.score}_attention")(query, key, value, **parameters)
        if self.backward:
            torch.autograd.grad(output, [query, key, value, *parameters.values()], torch.ones_like(output))


@dataclass(frozen=True)
class Decode:
    """New tokens of four query heads over a staircase cache of one key head."""

    head_dim: int
    rows: int
    keys: int
    backward: bool = False

    def run(self) -> None:
        key = torch.ones(1, 1, self.keys, self.head_dim, dtype=torch.bfloat16)
        cache = attnx.StaircaseCache(1, 1, self.head_dim, self.keys, dtype=torch.bfloat16)
        cache.append(key, key)
        cache.attend(torch.ones(1, 4, self.rows // 4, self.head_dim, dtype=torch.bfloat16))


@dataclass(frozen=True)
class Weights:
    """Weights by key and by row, and largest logits."""

    score: Score
    dtype: str
    head_dim: int
    rows: int
    keys: int
    backward: bool = False

    def run(self) -> None:
        query, key = (
            torch.ones(1, 1, length, self.head_dim, dtype=getattr(torch, self.dtype))
            for length in (self.rows, self.keys)
        )
        attnx.attention_max_logits(query, key)
        logsumexp = torch.zeros(1, 1, self.rows) if self.score == "softmax" else None
        for function in (attnx.attention_key_weights, attnx.attention_row_weights):
            function(query, key, score=self.score, logsumexp=logsumexp)


class _Tile(NamedTuple):
    rows: int
    keys: int
    head_dim: int  # what it is padded to


def _tile(score: Score, dtype: str, head_dim: int, rows: int, direction: str = "forward") -> _Tile:
    kernel = getattr(attnx._C, f"cuda_{direction}_kernel")(
        f"{score}_attention",
        dtype,
        batch=1,
        heads_q=1,
        heads_k=1,
        length_q=rows,
        length_k=_BLOCK,
        head_dim=head_dim,
        value_dim=head_dim,
    )
    return _Tile(kernel["rows"], kernel["keys"], kernel["head_dim"])


# Each of these chooses a kernel of its own: a score, and a parameter that makes it another one.
_SCORES: tuple[tuple[Score, tuple[str, ...]], ...] = (("sigmoid", ()), ("softmax", ()), ("softmax", ("sink",)))
_BLOCK_SIZES = ((64, 64), (128, 64), (128, 128))
_PARAMETERS: tuple[tuple[Score, tuple[str, ...]], ...] = (("sigmoid", ("bias", "alibi_slopes")), ("softmax", ("sink",)))


def hopper_calls() -> Iterator[Call]:
    """The calls for sm_90a, in pairs like those of ``calls``."""
    for (score, parameters), dtype, head_dim in product(_SCORES, ("bfloat16", "float16"), (64, 128, 256)):
        keys = _tile(score, dtype, head_dim, 192).keys
        yield Call(score, dtype, head_dim, 384, 2 * keys, parameters=parameters)
        yield Call(score, dtype, head_dim, 384, 4 * keys, parameters=parameters)
        for block_size, tiles in product(_BLOCK_SIZES, (2, 4)):
            keys = tiles * block_size[1]
            yield Call(score, dtype, head_dim, 128, keys, block_size=block_size, parameters=parameters)
        if parameters:
            continue  # softmax's backward serves it
        tile = _tile(score, dtype, head_dim, 192, "backward")
        for tiles in (2, 4):
            yield Call(score, dtype, head_dim, tiles * tile.rows, 128, backward=True)
            for block_size in _BLOCK_SIZES:
                rows = tiles * block_size[0]
                yield Call(score, dtype, head_dim, rows, 128, backward=True, block_size=block_size)
    for score, parameters in _PARAMETERS:
        yield Call(score, "bfloat16", 64, 128, 64, backward=True, parameters=parameters)


def calls() -> Iterator[Call | Decode | Weights]:
    """The calls for sm_80, in pairs: the second runs the loop over keys, or rows in a backward, twice as often."""
    head_dims = dict.fromkeys(_tile("softmax", "bfloat16", d, 64).head_dim for d in range(32, 257, 32))
    for (score, parameters), dtype in product(_SCORES, ("bfloat16", "float16")):
        # A head dimension less one is padded, and its rows do not lie on 16 bytes.
        for head_dim in (d - odd for odd in (0, 1) for d in head_dims):
            for rows in (64, 128):  # up to 64 take narrow tiles
                keys = _tile(score, dtype, head_dim, rows).keys
                yield Call(score, dtype, head_dim, rows, 2 * keys, parameters=parameters)
                yield Call(score, dtype, head_dim, rows, 4 * keys, parameters=parameters)  # more would be split
            for block_size, tiles in product(_BLOCK_SIZES, (2, 4)):
                keys = tiles * block_size[1]
                yield Call(score, dtype, head_dim, 128, keys, block_size=block_size, parameters=parameters)
            if parameters:
                continue  # softmax's backward serves it
            for rows in (128, 256):
                yield Call(score, dtype, head_dim, rows, 128, backward=True)
                for block_size in _BLOCK_SIZES:
                    yield Call(score, dtype, head_dim, rows, 128, backward=True, block_size=block_size)
        yield Call(score, dtype, 64, 1, 1024, parameters=parameters)  # split along the keys
    for score, parameters in _PARAMETERS:
        yield Call(score, "bfloat16", 64, 128, 64, backward=True, parameters=parameters)
    for (score, _), dtype, head_dim, odd in product(_SCORES[:2], ("bfloat16", "float16"), (64, 128, 256), (0, 1)):
        for rows in (128, 256):
            yield Weights(score, dtype, head_dim - odd, rows, 128)
        yield Call(score, dtype, head_dim - odd, 128, 128, backward=True, block_size=(128, 128), block_bias=True)
    for head_dim, new, keys in product((64, 128, 256), (1, 16), (2048, 4096)):
        yield Decode(head_dim, 4 * new, keys)


def main() -> None:
    torch.set_num_threads(1)
    path = Path(os.environ["CUDAEMU_PROFILE"])
    path.touch()
    with path.open() as profile:
        for call in hopper_calls() if attnx._C.cuda_mainloop() == "sm90" else calls():
            call.run()
            own = {"rows": call.rows, "keys": call.keys, "backward": call.backward}
            for line in profile:
                print(json.dumps(json.loads(line) | own))


if __name__ == "__main__":
    main()
