"""What CUDA kernels cost at the sizes of their goals, counted by an emulator: ``python bench/emulated_counts.py kept``

It prints the launches, warp instructions (of PTX), operations of tensor cores and bytes of global memory (32 for each
sector, and what TMA moves) of each kernel of each call, as the notes on CUDA show them. The emulator, cudaemu, is the
CUDA runtime of the process: LD_LIBRARY_PATH names its folder, ATTNX_CUDA_ON_HOST=1 sends calls to it, CUDAEMU_CC says
which device it is, and CUDAEMU_PROFILE names a file for its profile.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import attnx
from kernels import is_ours, label

Calls = Iterator[tuple[str, Callable[[], Any]]]
_SECTOR = 32  # bytes
_COUNTERS = ("launches", "warp instructions", "operations", "bytes")
_ROUND: dict[str, Any] = {"seed": 1, "offset": 2}


def _inputs(heads: int, length: int, head_dim: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, length, head_dim).bfloat16() for _ in range(3)]


def kept() -> Calls:
    """Dense attention, and the same with every block of 128 x 128 in a list; 68 heads fill the device."""
    for score, head_dim, is_causal in product(("softmax", "sigmoid"), (64, 128), (False, True)):
        query, key, value = _inputs(68, 1024, head_dim)
        name = f"{score} {head_dim}{' causal' if is_causal else ''}"
        dense = getattr(attnx, f"{score}_attention")
        yield f"{name} dense", functools.partial(dense, query, key, value, is_causal=is_causal)
        options: dict[str, Any] = {"keep": torch.ones(8), "block_size": (128, 128), "score": score, **_ROUND}
        listed = functools.partial(attnx.probabilistic_attention, query, key, value, is_causal=is_causal, **options)
        yield f"{name} listed", listed


def drawing() -> Calls:
    """The lists of a round: a tenth of the blocks of 12 heads of 32768 tokens."""
    for block, mode, is_causal in product((128, 64), ("bernoulli", "topm"), (False, True)):
        options: dict[str, Any] = {"density": 0.1, "mode": mode, "block_size": (block, block), "is_causal": is_causal}
        draw = functools.partial(attnx.probabilistic_block_mask, 1, 12, 32768, 32768, **options, **_ROUND)
        yield f"{block} {mode}{' causal' if is_causal else ''}", draw


def sparse_linear() -> Calls:
    """Forward and backward of a layer of Wan 2.1: 12 heads of 32760 tokens and 128 features, map included."""
    leaves = query, key, value = tuple(x.requires_grad_() for x in _inputs(12, 32760, 128))
    parts: list[Tensor] = []
    yield "forward", lambda: parts.extend(attnx.sparse_linear_attention(query, key, value))
    yield "backward", lambda: torch.autograd.grad(parts, leaves, [torch.ones_like(x) for x in parts])


def staircase() -> Calls:
    """Caches of one head of 128 channels, nearly all of them at 2 bits: an append of all, and one query over them."""
    for tokens in (131072, 262144):
        query, key, value = _inputs(1, tokens, 128)
        cache = attnx.StaircaseCache(1, 1, 128, tokens, dtype=torch.bfloat16)
        yield f"append {tokens}", functools.partial(cache.append, key, value)
        yield f"attend {tokens}", functools.partial(cache.attend, query[:, :, -1:])


def routing() -> Calls:
    """One head, because all cost the same: clusters of N / C queries and keys, C = sqrt(N), under a causal mask."""
    for length in (4096, 16384, 65536):
        leaves = query, key, value = tuple(x.requires_grad_() for x in _inputs(1, length, 64))
        clusters = round(length**0.5)
        centroids = torch.randn(1, clusters, 64)
        found: list[Any] = []
        for way in ("topk", "argmax"):
            route = functools.partial(attnx.route, query, key, centroids, routing=way, is_causal=True)
            yield f"{length} {way}", functools.partial(_keep, found, route)
        attend = functools.partial(attnx.routing_attention, query, key, value, found[0], is_causal=True)
        yield f"{length} forward", functools.partial(_keep, found, attend)
        output = found[-1]
        yield f"{length} backward", functools.partial(torch.autograd.grad, output, leaves, torch.ones_like(output))
        counts = torch.ones(1, clusters)
        yield f"{length} update", functools.partial(attnx.update_centroids_, centroids, counts, query, key)


def _keep(found: list[Any], call: Callable[[], Any]) -> None:
    found.append(call())


CALLS: dict[str, Callable[[], Calls]] = {
    "kept": kept,
    "drawing": drawing,
    "sparse-linear": sparse_linear,
    "staircase": staircase,
    "routing": routing,
}


def _profile(call: Callable[[], Any], file: Path) -> dict[str, dict[str, int]]:
    """The counters of each kernel that the call launches; those of a library together."""
    file.write_text("")
    call()
    kernels: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(_COUNTERS, 0))
    for launch in map(json.loads, file.read_text().splitlines()):
        name = launch["kernel"]
        counters = kernels[label(name) if is_ours(name) else "CUB" if "cub::" in name else "CUTLASS"]
        counters["launches"] += 1
        counters["warp instructions"] += launch["warp_instructions"]
        counters["operations"] += launch["mma_flops"] + launch["wgmma_flops"]
        counters["bytes"] += launch["global_sectors"] * _SECTOR + launch["tma_load_bytes"] + launch["tma_store_bytes"]
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("calls", choices=CALLS)
    arguments = parser.parse_args()
    if not attnx._C.cuda_on_host or "CUDAEMU_PROFILE" not in os.environ:
        parser.error("ATTNX_CUDA_ON_HOST, CUDAEMU_PROFILE: expected 1 and the name of a file")
    file = Path(os.environ["CUDAEMU_PROFILE"])
    table = Table("call", "kernel", *_COUNTERS)
    for name, call in CALLS[arguments.calls]():
        for kernel, counters in _profile(call, file).items():
            table.add_row(name, kernel, *(f"{counters[counter]:,}" for counter in _COUNTERS))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
