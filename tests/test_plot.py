"""The pictures: that they show what they are given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import attnx
import attnx.plot

LABELS = torch.tensor([[1, 0, -1, -1], [0, 1, 0, -1], [-1, 0, 1, 0]], dtype=torch.int8)[None, None]


def test_map(tmp_path: Path) -> None:
    axes = attnx.plot.block_map(attnx.SparseLinearMap(LABELS), path=tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    (image,) = axes.get_images()
    assert np.array_equal(image.get_array(), LABELS[0, 0].numpy())
    legend = axes.get_legend()
    assert legend is not None
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["critical: softmax (25%)", "marginal: linear (42%)", "negligible: skipped (33%)"]
    assert axes.get_ylabel() == "blocks of 64 queries"


def test_share_of_rounds() -> None:
    masks = [attnx.BlockMask.from_dense(visited) for visited in (LABELS == 1, LABELS >= 0)]
    (image,) = attnx.plot.block_map(masks).get_images()
    expected = ((LABELS == 1).float() + (LABELS >= 0).float())[0, 0] / 2
    assert np.array_equal(image.get_array(), expected.numpy())


def test_staircase(tmp_path: Path) -> None:
    cache = attnx.StaircaseCache(1, 1, 32, 256, window=32, dtype=torch.bfloat16)
    cache.append(*torch.zeros(2, 1, 1, 150, 32, dtype=torch.bfloat16).unbind(0))
    axes = attnx.plot.staircase(cache, path=tmp_path / "staircase.png")
    assert (tmp_path / "staircase.png").read_bytes().startswith(b"\x89PNG")
    heights = axes.patches[0].get_data().values
    assert heights.tolist() == [2] * 64 + [4] * 32 + [8] * 32 + [16] * 22
    assert axes.get_title() == "150 tokens, 5.76 bits on average"
    with pytest.raises(RuntimeError, match=r"^sequence: expected from 0 to 0, got 1"):
        attnx.plot.staircase(cache, sequence=1)


def test_clusters(tmp_path: Path) -> None:
    # Of 6 tokens: cluster 0 holds the last two, cluster 1 the first and the last, cluster 2 none.
    indices = torch.tensor([4, 5, 0, 5, 0, 0], dtype=torch.int32)[None, None]
    offsets = torch.tensor([0, 2, 4, 4], dtype=torch.int32)[None, None]
    routes = attnx.Routes(indices, offsets, indices, offsets, 6, 6)
    axes = attnx.plot.clusters(routes, path=tmp_path / "clusters.png")
    assert (tmp_path / "clusters.png").read_bytes().startswith(b"\x89PNG")
    assert [list(events.get_positions()) for events in axes.collections] == [[0, 5], [4, 5], []]
    assert axes.get_title() == "tokens in no cluster 50%, in one 33%, in several 17%"
    with pytest.raises(RuntimeError, match=r"^of: expected \"query\" or \"key\", got 'value'"):
        attnx.plot.clusters(routes, of="value")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"^head: expected from 0 to 0, got 2"):
        attnx.plot.clusters(attnx.Routes(indices.expand(1, 1, 6), offsets, indices, offsets, 6, 6), head=2)
    with pytest.raises(RuntimeError, match=r"^routes: expected attnx.Routes, got 3"):
        attnx.plot.clusters(3)  # type: ignore[arg-type]


def test_bad_input() -> None:
    with pytest.raises(RuntimeError, match=r"^blocks: expected a SparseLinearMap, a BlockMask or a sequence"):
        attnx.plot.block_map([])
    with pytest.raises(RuntimeError, match=r"^head: expected from 0 to 1, got 2"):
        attnx.plot.block_map(attnx.SparseLinearMap(LABELS.expand(1, 2, -1, -1)), head=2)
    masks = [attnx.BlockMask.from_dense(torch.ones(1, 1, 2, n, dtype=torch.bool)) for n in (2, 3)]
    with pytest.raises(RuntimeError, match=r"^blocks: expected masks of one size"):
        attnx.plot.block_map(masks)


def test_names_the_extra_that_is_missing() -> None:
    code = (
        "import sys, torch; sys.modules['matplotlib'] = sys.modules['matplotlib.figure'] = None; import attnx.plot; "
        "attnx.plot.block_map(attnx.SparseLinearMap(torch.zeros(1, 1, 1, 1, dtype=torch.int8)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.stderr.endswith("ModuleNotFoundError: attnx.plot: needs matplotlib: pip install 'attnx[demo]'\n")
