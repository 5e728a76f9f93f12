"""How long decoding over a staircase cache takes on a GPU, as its kernel is planned: ``python bench/decode_time.py``

The time of a turn is the longest of three: its bytes at a multiprocessor's share of the bandwidth, its instructions, of
which each scheduler issues one a cycle for one of the block's four warps, and its products on the tensor cores. The
time of the step is that of the multiprocessor with the most turns. What comes before the first turn and after the last
one is not in it: a launch, a trip to memory and the merge of the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from rich.console import Console
from rich.table import Table

BANDWIDTH = 3.0e12  # bytes a second that are reached, and the same for the peer in 16 bits
CLOCK = 1.755e9
MULTIPROCESSORS = 132
HEADS, GROUP, HEAD_DIM, WINDOW = 8, 4, 128, 128
LEVELS = (8, 4)  # of the newest windows; 2 bits are the last level
BLOCKS_PER_MULTIPROCESSOR = {1: 3, 2: 3, 4: 2, 8: 2}  # decode_blocks_per_sm, by tiles of 8 rows
# Instructions of a warp in a turn of 128 tokens of sm_80, as sasscost and the blocks of its listing count them.
INSTRUCTIONS = {1: 780, 2: 950, 4: 1265, 8: 2220}
PRODUCTS = 42  # of mma.m16n8k16 in such a turn, for each tile of 8 rows
PRODUCT_CYCLES = 2048 / 512 / 0.63  # on a tensor core, which mma.sync fills to 63 %


@dataclass(frozen=True)
class Kind:
    """Turns of one kind of one key head."""

    turns: float
    tokens: int  # of a turn
    bits: int  # of a number, with its share of the ranges

    @property
    def bytes(self) -> float:
        return self.tokens * 2 * HEAD_DIM * self.bits / 8


def kinds(tokens: int) -> list[Kind]:
    """The tail holds half a window."""
    tail = WINDOW // 2
    plain = tokens - tail - len(LEVELS) * WINDOW
    refined = [Kind(WINDOW / 32, 32, level + 1) for level in LEVELS]
    return [Kind(plain / 128, 128, 3), *refined, Kind(tail / 16, 16, 16)]


def splits_of(tiles: int, turns: float, blocks_per_multiprocessor: int) -> int:
    """This plans as splits_of in csrc/cuda/staircase/attention.cpp does, and must follow it."""
    slots = MULTIPROCESSORS * blocks_per_multiprocessor
    splits = max(slots // tiles, 1)
    while tiles * splits < 0.9 * -(-tiles * splits // MULTIPROCESSORS) * MULTIPROCESSORS:
        if (splits + 1) * tiles > 4 * slots:
            break
        splits += 1
    return min(splits, int(turns))


def row(batch: int, tokens: int, new: int) -> list[str]:
    rows = GROUP * new
    row_tiles = next(x for x in (1, 2, 4, 8) if x * 8 >= min(rows, 64))
    tiles = batch * HEADS * -(-rows // (row_tiles * 8))
    of_head = kinds(tokens)
    turns = sum(x.turns for x in of_head)
    splits = splits_of(tiles, turns, BLOCKS_PER_MULTIPROCESSOR[row_tiles])
    blocks = tiles * splits
    total = batch * HEADS * sum(x.turns * x.bytes for x in of_head)
    # Blocks take every so many turns, and multiprocessors every so many blocks.
    most = max(
        sum(-(-(int(turns) - block % splits) // splits) for block in range(first, blocks, MULTIPROCESSORS))
        for first in range(min(MULTIPROCESSORS, blocks))
    )
    even = tiles * turns / MULTIPROCESSORS
    memory = total / BANDWIDTH
    issue = even * INSTRUCTIONS[row_tiles] / CLOCK
    tensor = even * row_tiles * PRODUCTS * PRODUCT_CYCLES / CLOCK
    step = max(memory, issue, tensor) * most / even
    dense = batch * HEADS * tokens * 2 * HEAD_DIM * 2 / BANDWIDTH
    times = (f"{x * 1e6:.1f}" for x in (memory, issue, tensor, step, dense))
    return [str(batch), str(tokens), str(new), f"{total / 1e6:.1f}", str(blocks), *times, f"{memory / step:.0%}"]


def main() -> None:
    times = ("memory us", "issue us", "tensor us", "step us", "16 bits us")
    table = Table("batch", "tokens", "new", "MB", "blocks", *times, "share")
    for batch, tokens, new in product((1, 8), (8192, 32768, 131072), (1, 16)):
        table.add_row(*row(batch, tokens, new))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
