"""Counts the instructions of a turn of decoding over a staircase cache: ``python bench/decode_instructions.py FILE...``

The files are objects or libraries with machine code for sm_80, whose listings cuobjdump prints. A turn is 128 tokens of
128 channels at 2 bits, which the first plane alone has, without a rise of a maximum. Its way through the kernel is the
shortest one round the loop over turns that has as many instructions of four kinds as the source says of a warp. What a
predicate turns off counts, too, as it takes its turn to be issued.
"""

from __future__ import annotations

import argparse
import heapq
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

KERNEL = "_ZN5attnx4cuda22attnx_staircase_decodeILi{bits}ELi{head_dim}ELi{row_tiles}EEEvNS0_15DecodeArgumentsE"
BITS, HEAD_DIM, TILES, THREADS = 2, 128, 4, 128  # TILES: of 32 tokens, in a turn
ROW_TILES = (1, 2, 4, 8)
CODES = 2 * TILES * 32 * HEAD_DIM  # of keys and values
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?\w+ )?\s*([A-Z][\w.]*)([^;]*);")
# Maxima that rise, the tail, and what the processor does where the threads of a warp have parted.
ELSEWHERE = ("SHFL", "LDSM", "CALL", "RET", "EXIT")
CONSTANT_FACTOR = re.compile(r" \d+(\.\d+)?, ")  # of two halves: the place of a further plane
KINDS = ("HMMA", "LDGSTS", "LDS.64", "MOVM")


def expected(row_tiles: int) -> tuple[int, ...]:
    """The instructions of each of the kinds that a warp has in a turn."""
    blocks, passes = HEAD_DIM // 32, -(-row_tiles // 4)  # passes: how often keys are unpacked
    products = row_tiles * (blocks * 6 + TILES * 4 + 2)  # keys with their middles, values, and the latter's middles
    copied = CODES * BITS // 8 + TILES * HEAD_DIM * 4 + TILES * blocks * 32 * 4  # bytes of codes and of ranges
    ranges = 4 * (passes * blocks + TILES + 1) + row_tiles  # with a pair of maxima for each tile of rows
    return products, copied // (THREADS * 16), ranges, 4 * row_tiles


@dataclass
class Block:
    length: int = 0
    kinds: tuple[int, ...] = (0,) * len(KINDS)
    following: list[int] = field(default_factory=list)


def read(listing: str) -> dict[int, Block]:
    """The basic blocks of a kernel, by address, without those that lie elsewhere."""
    lines = [(int(at, 16), bool(predicate), name, rest) for at, predicate, name, rest in LINE.findall(listing)]
    # Loops are left by calls under a condition, too.
    jumps = [x for x in lines if x[2].startswith("BRA") or (x[1] and x[2].startswith("CALL"))]
    targets = {at: int(rest.split("0x")[-1], 16) for at, _, _, rest in jumps}
    after = dict(zip([at for at, *_ in lines], [at for at, *_ in lines[1:]], strict=False))
    starts = {lines[0][0], *targets.values()}
    starts |= {after[at] for at, _, name, _ in lines if at in after and name.startswith(("BRA", "BRX", *ELSEWHERE[2:]))}
    blocks: dict[int, Block] = {}
    left: set[int] = set()
    tables = []
    for at, predicated, name, rest in lines:
        if at in starts:
            start, blocks[at] = at, Block()
        block = blocks[start]
        block.length += 1
        block.kinds = tuple(n + name.startswith(kind) for n, kind in zip(block.kinds, KINDS, strict=True))
        if name.startswith(ELSEWHERE) and not (predicated and name.startswith(ELSEWHERE[2:])):
            left.add(start)
        if name == "HMUL2" and CONSTANT_FACTOR.search(rest):
            left.add(start)
        if at in targets:
            block.following.append(targets[at])
        if name.startswith("BRX"):
            tables.append(block)
        falls = predicated or "." in name or not name.startswith(("BRA", "BRX"))
        if falls and after.get(at) in starts:
            block.following.append(after[at])
    # A block that nothing else leads to is reached by a table of addresses.
    reached = {lines[0][0]}.union(*(block.following for block in blocks.values()))
    for block in tables:
        block.following += [x for x in blocks if x not in reached]
    return {at: block for at, block in blocks.items() if at not in left}


def turn(blocks: dict[int, Block], wanted: tuple[int, ...]) -> int | None:
    """The least instructions round the outermost loop with products, of so many of each kind."""
    products = [at for at, block in blocks.items() if block.kinds[0]]
    back = [(x, at) for at, block in blocks.items() for x in block.following if x <= at]
    first = max(x for x, last in back if x < products[0] and last > products[-1])
    paths = [(0, first, (0,) * len(KINDS))]
    best = {paths[0][1:]: 0}
    while paths:
        length, at, kinds = heapq.heappop(paths)
        if at == first and kinds == wanted:
            return length
        if at not in blocks or length > best[at, kinds]:
            continue
        block = blocks[at]
        # A turn starts with its copies, and before its first product two tiles' ranges are loaded at most.
        if block.kinds[0] and (kinds[1] != wanted[1] or (kinds[0] == 0 and kinds[2] > 8)):
            continue
        now = tuple(n + own for n, own in zip(kinds, block.kinds, strict=True))
        if any(n > most for n, most in zip(now, wanted, strict=True)):
            continue
        for x in block.following:
            if length + block.length < best.get((x, now), 1 << 30):
                best[x, now] = length + block.length
                heapq.heappush(paths, (length + block.length, x, now))
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    table = Table("rows", "instructions", "a code and row", *KINDS)
    for row_tiles in ROW_TILES:
        name = KERNEL.format(bits=BITS, head_dim=HEAD_DIM, row_tiles=row_tiles)
        wanted = expected(row_tiles)
        for file in parser.parse_args().files:
            command = ["cuobjdump", "-sass", "-arch", "sm_80", "-fun", name, file]
            listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            if LINE.search(listing):
                length = turn(read(listing), wanted)
                share = "" if length is None else f"{length / CODES * 4 / (row_tiles * 8):.4f}"
                table.add_row(str(row_tiles * 8), str(length), share, *map(str, wanted))
    Console().print(table)


if __name__ == "__main__":
    main()
