"""attnx.BlockMask and the masks of torch.nn.attention.flex_attention, both ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attnx

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

LENGTHS = [(256, 256), (300, 300), (200, 500)]


def random_mask(length_q: int, length_k: int, block_size: tuple[int, int] = (128, 128)) -> attnx.BlockMask:
    blocks = -(-length_q // block_size[0]), -(-length_k // block_size[1])
    visited = torch.rand(1, 2, *blocks, generator=torch.Generator().manual_seed(0)) < 0.5
    visited[..., 0] = True
    return attnx.BlockMask.from_dense(visited, block_size)


def inputs(length_q: int, length_k: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 2, n, 16, generator=generator) for n in (length_q, length_k, length_k)]


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_to_flex(lengths: tuple[int, int], is_causal: bool, backend: object) -> None:
    mask, x = random_mask(*lengths), inputs(*lengths)
    flex = mask.to_flex(*lengths, is_causal=is_causal)
    ours = attnx.block_sparse_attention(*x, mask, is_causal=is_causal)
    torch.testing.assert_close(ours, flex_attention(*x, block_mask=flex))
    torch.testing.assert_close(ours, attnx.block_sparse_attention(*x, flex))


@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (64, 128)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_there_and_back(is_causal: bool, block_size: tuple[int, int]) -> None:
    mask = random_mask(300, 500, block_size)
    back, causal = attnx.BlockMask.from_flex(mask.to_flex(300, 500, is_causal=is_causal))
    visited = mask.to_dense(-(-500 // block_size[1]))
    if is_causal:  # blocks that no query of the row sees are gone
        i, j = (torch.arange(n) for n in visited.shape[2:])
        last = ((i + 1) * block_size[0]).clamp(max=300) - 1 + 200
        visited = visited & (j * block_size[1] <= last[:, None])
    assert causal == is_causal
    assert back.block_size == block_size
    assert torch.equal(back.to_dense(visited.shape[-1]), visited)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_causal_mask_of_flex(lengths: tuple[int, int], backend: object) -> None:
    offset = lengths[1] - lengths[0]
    flex = create_block_mask(lambda b, h, i, j: i + offset >= j, None, None, *lengths, device="cpu")
    mask, is_causal = attnx.BlockMask.from_flex(flex)
    assert is_causal
    x = inputs(*lengths)
    expected = attnx.softmax_attention(*x, is_causal=True)
    torch.testing.assert_close(attnx.block_sparse_attention(*x, mask, is_causal=True), expected)
    torch.testing.assert_close(attnx.block_sparse_attention(*x, flex), expected)


def test_other_masks_are_refused() -> None:
    small = create_block_mask(lambda b, h, i, j: i >= j, None, None, 256, 256, device="cpu", BLOCK_SIZE=32)
    with pytest.raises(RuntimeError, match=r"^block_mask: expected blocks of 64 or 128 on each side, got \(32, 32\)"):
        attnx.BlockMask.from_flex(small)
    with pytest.raises(
        RuntimeError, match=r"^block_mask: expected attnx.BlockMask or flex_attention's, got <class 'int"
    ):
        attnx.block_sparse_attention(*inputs(64, 64), 3)


@pytest.mark.backends("cpu")
def test_compiled_calls_take_converted_masks(backend: object) -> None:
    x = inputs(256, 256)
    flex = create_block_mask(lambda b, h, i, j: i >= j, None, None, 256, 256, device="cpu")
    converted, is_causal = attnx.BlockMask.from_flex(flex)

    def attention(query: Tensor, mask: attnx.BlockMask) -> Tensor:
        return attnx.block_sparse_attention(query, *x[1:], mask, is_causal=is_causal)

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"convert it once, outside, with attnx.BlockMask.from_flex"
    ):
        compiled(x[0], flex)
    assert torch.equal(compiled(x[0], converted), attention(x[0], flex))


def test_transposed() -> None:
    mask = random_mask(300, 500, (64, 128))
    counts, indices = mask.transposed(4)
    back = attnx.BlockMask(counts, indices).to_dense(5)
    assert torch.equal(back.mT, mask.to_dense(4))
