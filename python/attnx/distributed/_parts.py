"""Which rows of a process see which keys of another: the calls of an operator for one step around the ring."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Band:
    """The keys that a query sees, by how far before it they stand.

    Attributes:
        left: how many keys before its place a query sees; -1 for all.
        right: how many after it; -1 for all, 0 under a causal mask.
        shift: how many places later a query stands than the key of its number.
        by_distance: whether logits depend on the distance, as those with ALiBi do.
    """

    left: int
    right: int
    shift: int
    by_distance: bool


@dataclass(frozen=True)
class Shard:
    """Rows of one process: which chunks of the sequence they are, in order, and how many rows a chunk has."""

    chunks: tuple[int, ...]
    length: int

    def rows(self, chunks: range) -> slice:
        return slice(chunks.start * self.length, chunks.stop * self.length)

    def every(self) -> range:
        return range(len(self.chunks))


@dataclass(frozen=True)
class Part:
    """One call: rows of the queries over rows of the keys.

    Attributes:
        queries: the rows of the queries.
        keys: those of the keys.
        is_cut: whether the band hides some of their pairs.
        position_offset: the operator's argument of that name.
    """

    queries: slice
    keys: slice
    is_cut: bool
    position_offset: int = 0


def parts(queries: Shard, keys: Shard, band: Band) -> list[Part]:
    """The calls that cover every pair of a query and a key that the band leaves, and hardly others.

    Chunks become one call where they may: whole rectangles, and a causal square, in which only the order counts.
    """
    if queries == keys and band == Band(-1, 0, 0, False):
        everything = queries.rows(queries.every())
        return [Part(everything, everything, is_cut=True)]
    found = []
    wholly_seen: list[list[int]] = [[] for _ in queries.chunks]
    for i, of_queries in enumerate(queries.chunks):
        for j, of_keys in enumerate(keys.chunks):
            # The first query stands this far after the first key. Pairs are nearest and farthest at ends of chunks.
            shift = of_queries * queries.length - of_keys * keys.length + band.shift
            nearest, farthest = shift - (keys.length - 1), shift + queries.length - 1
            if (band.left >= 0 and nearest > band.left) or (band.right >= 0 and farthest < -band.right):
                continue
            is_cut = (band.left >= 0 and farthest > band.left) or (band.right >= 0 and nearest < -band.right)
            if is_cut or band.by_distance:
                offset = shift - (keys.length - queries.length)  # operators align both at their ends
                of = (queries.rows(range(i, i + 1)), keys.rows(range(j, j + 1)))
                found.append(Part(*of, is_cut, offset))
            else:
                wholly_seen[i].append(j)
    if wholly_seen.count(wholly_seen[0]) == len(wholly_seen):
        together = [(queries.every(), wholly_seen[0])]
    else:
        together = [(range(i, i + 1), seen) for i, seen in enumerate(wholly_seen)]
    for of_rows, seen in together:
        if seen:  # neighbours, as there are at most two
            found.append(Part(queries.rows(of_rows), keys.rows(range(seen[0], seen[-1] + 1)), is_cut=False))
    return found
