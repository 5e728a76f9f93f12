"""How long attention over a staircase cache takes on a GPU, as its kernels are planned: ``python bench/decode_time.py``

Decoding and the mainloop for sm_80 are compared at the same sizes. A multiprocessor's time for what a block computes at
a time is the longest of three: its bytes at a share of the bandwidth, its instructions, of which each scheduler issues
one a cycle for one of the block's four warps, and its products on the tensor cores. The time of the call is that of the
multiprocessor with the most of them. What comes before the first and after the last one is not in it: a launch, a trip
to memory and the merge of the blocks; nor is what is read again from the L2 cache.

The plans are those of attnx, which asks the CUDA runtime for the device: on the emulator ATTNX_CUDA_ON_HOST=1 and
CUDAEMU_CC=90 are an H100.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

from rich.console import Console
from rich.table import Table

import attnx

BANDWIDTH = 3.0e12  # bytes a second that are reached, and the same for the peer in 16 bits
CLOCK = 1.755e9
MULTIPROCESSORS = 132
HEADS, GROUP, HEAD_DIM, WINDOW = 8, 4, 128, 128
LEVELS = (8, 4, 2)  # 8 and 4 bits are each of one window, and 2 bits of all older ones
PRODUCT_CYCLES = 2048 / 512 / 0.63  # of mma.m16n8k16 on a tensor core, which mma.sync fills to 63 %

# Instructions of a warp in a turn of 128 tokens of decoding, by tiles of 8 rows, and in a tile of keys of the mainloop,
# by its rows and keys: those of sm_80 along the path of 2 bits without a rise of a maximum or a mask, as
# bench/decode_instructions.py counts those of decoding and nvdisasm lists those of the loop.
DECODE = {1: 826, 2: 984, 4: 1306, 8: 2095}
DECODE_PRODUCTS = 42  # in such a turn, for each tile of 8 rows
LOOP = {(128, 64): 1866}


@dataclass(frozen=True)
class Kind:
    """Turns of one kind of one key head."""

    turns: float
    tokens: int  # of a turn
    bits: int  # of a number, with its share of the ranges

    @property
    def bytes(self) -> float:
        return self.turns * self.tokens * 2 * HEAD_DIM * self.bits / 8


def kinds(tokens: int) -> list[Kind]:
    """The tail holds half a window."""
    tail = WINDOW // 2
    plain = tokens - tail - (len(LEVELS) - 1) * WINDOW
    refined = [Kind(WINDOW / 32, 32, level + 1) for level in LEVELS[:-1]]
    return [Kind(plain / 128, 128, LEVELS[-1] + 1), *refined, Kind(tail / 16, 16, 16)]


def plan(mainloop: Literal["auto", "sm80", "decode"], batch: int, tokens: int, new: int) -> attnx._C.CudaKernel:
    with attnx.cuda_mainloop(mainloop):
        return attnx._C.cuda_forward_kernel(
            "staircase_attention",
            "bfloat16",
            batch=batch,
            heads_q=HEADS * GROUP,
            heads_k=HEADS,
            length_q=new,
            length_k=tokens,
            head_dim=HEAD_DIM,
            value_dim=HEAD_DIM,
            window=(-1, 0),
            cache=([16, *LEVELS], WINDOW, 32, 0, tokens),
        )


@dataclass(frozen=True)
class Time:
    """Seconds, and the number of blocks."""

    blocks: int
    memory: float
    issue: float
    tensor: float
    uneven: float  # the most that a multiprocessor has, over the mean

    @property
    def step(self) -> float:
        return max(self.memory, self.issue, self.tensor) * self.uneven


def time_of(kernel: attnx._C.CudaKernel, batch: int, tokens: int, new: int) -> Time:
    tiles = batch * HEADS * -(-GROUP * new // kernel["rows"])
    if kernel["mainloop"] == "decode":
        turns = sum(x.turns for x in kinds(tokens))
        instructions, products = DECODE[kernel["rows"] // 8], DECODE_PRODUCTS * kernel["rows"] // 8
    else:
        turns = tokens / kernel["keys"]
        instructions = LOOP[kernel["rows"], kernel["keys"]]
        products = 2 * kernel["rows"] * kernel["keys"] * HEAD_DIM // (16 * 8 * 16) // 4
    splits = kernel["splits"]
    blocks = tiles * splits
    # Blocks take every so many turns, and multiprocessors every so many blocks.
    most = max(
        sum(-(-(int(turns) - block % splits) // splits) for block in range(first, blocks, MULTIPROCESSORS))
        for first in range(min(MULTIPROCESSORS, blocks))
    )
    even = tiles * turns / MULTIPROCESSORS
    memory = batch * HEADS * sum(x.bytes for x in kinds(tokens)) / BANDWIDTH
    issue, tensor = even * instructions / CLOCK, even * products * PRODUCT_CYCLES / CLOCK
    return Time(blocks, memory, issue, tensor, most / even)


def row(batch: int, tokens: int, new: int) -> list[str]:
    chosen = plan("auto", batch, tokens, new)
    decode, loop = (time_of(plan(x, batch, tokens, new), batch, tokens, new) for x in ("decode", "sm80"))
    times = (
        [str(x.blocks), *(f"{seconds * 1e6:.1f}" for seconds in (x.memory, x.issue, x.tensor, x.step))]
        for x in (decode, loop)
    )
    dense = batch * HEADS * tokens * 2 * HEAD_DIM * 2 / BANDWIDTH
    sizes = [str(batch), str(tokens), str(new)]
    return [*sizes, *(x for of_kernel in times for x in of_kernel), f"{dense * 1e6:.1f}", chosen["mainloop"]]


def main() -> None:
    columns = [f"{kernel}\n{x}" for kernel in ("decode", "loop") for x in ("blocks", "mem", "issue", "tensor", "us")]
    table = Table("batch", "tokens", "new", *columns, "16 bits\nread us", "chosen")
    for batch, tokens, new in product((1, 8), (8192, 131072), (1, 16, 32, 256)):
        table.add_row(*row(batch, tokens, new))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
