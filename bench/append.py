"""What a cache takes for each token appended, and in all, over its length. ``python bench/append.py --help``

Contenders: the staircase; tensors of the full size that a token is copied into; and torch.cat, which copies them all.
One sample is the mean over a whole window of tokens, so that each has one step of the staircase in it.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import attnx
from device import open_device
from machine import facts
from suite import DTYPES
from timing import Rounds, interleave

HEADS, HEAD_DIM, WINDOW = 8, 128, 128
LENGTHS = (1024, 4096, 16384, 65536)

Append = Callable[[Tensor, Tensor], None]


def staircase(key: Tensor, value: Tensor) -> tuple[Append, Callable[[], None], int]:
    cache = attnx.StaircaseCache(1, HEADS, HEAD_DIM, key.shape[2] + WINDOW, dtype=key.dtype, device=key.device)
    cache.append(key, value)
    return cache.append, lambda: cache.crop(key.shape[2]), cache.nbytes


def static(key: Tensor, value: Tensor) -> tuple[Append, Callable[[], None], int]:
    full = torch.empty(2, 1, HEADS, key.shape[2] + WINDOW, HEAD_DIM, dtype=key.dtype, device=key.device)
    end = key.shape[2]

    def append(k: Tensor, v: Tensor) -> None:
        nonlocal end
        full[0, :, :, end : end + 1], full[1, :, :, end : end + 1] = k, v
        end += 1

    def crop() -> None:
        nonlocal end
        end = key.shape[2]

    return append, crop, full.numel() * full.element_size()


def concatenated(key: Tensor, value: Tensor) -> tuple[Append, Callable[[], None], int]:
    held = [key, value]

    def append(k: Tensor, v: Tensor) -> None:
        held[:] = torch.cat([held[0], k], 2), torch.cat([held[1], v], 2)

    def crop() -> None:
        held[:] = key, value

    return append, crop, 2 * (key.numel() + WINDOW * HEADS * HEAD_DIM) * key.element_size()


CONTENDERS = {"staircase": staircase, "static": static, "torch.cat": concatenated}


def _mean_seconds(append: Append, crop: Callable[[], None], new: list[Tensor], tokens: int) -> float:
    synchronize = torch.cuda.synchronize if new[0].is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(tokens):
        append(*new)
    synchronize()
    seconds = (time.perf_counter() - start) / tokens
    crop()
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"], help="(default: both)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write JSON here, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        device = open_device(arguments.device).torch_device
    except ValueError as error:
        parser.error(str(error))
    rows = []
    table = Table(title=f"Appending one token at a time, 1 x {HEADS} heads x {HEAD_DIM}, and memory of the cache")
    for header in ("dtype", "tokens", "cache", "us a token", "MiB"):
        table.add_column(header, justify="left" if header in ("dtype", "cache") else "right")
    for dtype in arguments.dtype or ["float32", "bfloat16"]:
        for length in LENGTHS:
            generator = torch.Generator().manual_seed(0)
            key, value, *new = (
                torch.randn(1, HEADS, n, HEAD_DIM, generator=generator).to(device, DTYPES[dtype])
                for n in (length, length, 1, 1)
            )
            samplers, sizes = {}, {}
            for name, build in CONTENDERS.items():
                append, crop, sizes[name] = build(key, value)
                tokens = 2 if name == "torch.cat" else WINDOW  # each copies everything: all take as long

                sample = functools.partial(_mean_seconds, append, crop, new, tokens)
                sample()
                samplers[name] = sample
            for name, samples in interleave(samplers, Rounds(5, 15, 2.0)).items():
                rows.append({"dtype": dtype, "length": length, "cache": name, "bytes": sizes[name], "samples": samples})
                cells = f"{np.median(samples) * 1e6:.1f}", f"{sizes[name] / 2**20:.1f}"
                table.add_row(dtype, str(length), name, *cells)
            table.add_section()
    Console(highlight=False, width=None if sys.stdout.isatty() else 110).print(table)
    if arguments.output:
        content = {"facts": facts(device), "rows": rows}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
