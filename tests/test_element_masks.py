"""Masks that hide elements of their blocks: made without pairs, taken from flex_attention, joined and given back."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention, or_masks

import attnx
from attnx.testing import assert_close
from backends import Backend
from cases import Shape, random_inputs
from compare import forward_backward
from logit_terms import eager, within

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

BlockMask = attnx.BlockMask
LENGTHS = [(256, 256), (300, 300), (200, 500), (330, 130)]
BLOCK_SIZES = [(64, 64), (128, 128), (128, 64), (64, 128)]
USED = torch.tensor([100, 37])
# Documents that do not start on blocks; the last has one token.
DOCUMENTS = torch.tensor([0] * 50 + [3] * 100 + [1] * 149 + [2])
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def elements(mask: attnx.BlockMask, length_q: int, length_k: int) -> Tensor:
    """The bool tensor (batch or 1, heads or 1, length_q, length_k) that the mask stands for."""
    block_q, block_k = mask.block_size
    blocks = mask.to_dense(-(-length_k // block_k))
    pairs = blocks.repeat_interleave(block_q, 2)[:, :, :length_q].repeat_interleave(block_k, 3)[..., :length_k]
    if mask.row_bounds is not None:
        pairs = pairs & within(mask.row_bounds, length_k)
    return pairs if mask.attn_mask is None else pairs & mask.attn_mask


def of_mod(mask_mod: MaskMod, batch: int, heads: int, length_q: int, length_k: int) -> Tensor:
    b, h, i, j = torch.meshgrid(*map(torch.arange, (batch, heads, length_q, length_k)), indexing="ij")
    return mask_mod(b, h, i, j).expand(b.shape)


def mods(length_q: int, length_k: int) -> dict[str, MaskMod]:
    """What flex_attention's users write, with the diagonal at the bottom right."""
    offset = length_k - length_q

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i + offset >= j

    def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i + offset - j <= 70) & (i + offset - j >= -9)

    def prefix(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < 90

    def padding(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j < USED[b]

    def documents(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return DOCUMENTS[i.clamp(max=299)] == DOCUMENTS[j.clamp(max=299)]

    def by_head(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i + offset - j).abs() <= 20 + 50 * h

    return {
        "causal": causal,
        "window": window,
        "prefix": or_masks(causal, prefix),
        "padding": padding,
        "by_head": by_head,
        "documents": documents,
        "causal_documents": and_masks(causal, documents),
        "causal_window_padding": and_masks(causal, window, padding),
        "prefix_padding": and_masks(or_masks(causal, prefix), padding),
    }


OTHERS: dict[str, MaskMod] = {
    "dilated": lambda b, h, i, j: (i - j) % 3 == 0,
    "sinks_and_window": lambda b, h, i, j: (j < 4) | ((i - j).abs() < 30),
    "two_in_blocks": lambda b, h, i, j: (j % 128 < 5) | (j % 128 > 100),
}


# Made without pairs ---------------------------------------------------------------------------------------------------


def made(lengths: tuple[int, int], block_size: tuple[int, int]) -> dict[str, attnx.BlockMask]:
    size: dict[str, Any] = {"block_size": block_size}
    causal, window = BlockMask.causal(*lengths, **size), BlockMask.window(*lengths, (70, 9), **size)
    prefix, padding = BlockMask.prefix(90, *lengths, **size), BlockMask.padding(USED, *lengths, **size)
    masks = {"causal": causal, "window": window, "prefix": prefix, "padding": padding}
    masks |= {"causal_window_padding": causal & window & padding, "prefix_padding": padding & prefix}
    if lengths == (300, 300):
        documents = BlockMask.documents(DOCUMENTS, **size)
        masks |= {"documents": documents, "causal_documents": documents & causal}
    return masks


@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_masks_are_made_without_pairs(lengths: tuple[int, int], block_size: tuple[int, int]) -> None:
    """They show the pairs that they say, and list no block that shows none."""
    for name, mask in made(lengths, block_size).items():
        pairs = elements(mask, *lengths)
        assert torch.equal(pairs, of_mod(mods(*lengths)[name], len(pairs), 1, *lengths)), name
        assert (mask.lengths, mask.block_size) == (lengths, block_size)
        q, k = (-length % block for length, block in zip(lengths, block_size, strict=True))
        blocks = torch.nn.functional.pad(pairs, (0, k, 0, q)).unflatten(3, (-1, block_size[1]))
        visited = blocks.unflatten(2, (-1, block_size[0])).any(-1).any(3)
        assert torch.equal(mask.to_dense(), visited), name
        assert mask.row_bounds is not None
        assert mask.row_bounds.numel() <= 2 * 2 * lengths[0], name


def test_documents_by_offsets_and_of_several_sequences() -> None:
    offsets = torch.tensor([0, 50, 150, 299, 300])
    by_id = BlockMask.documents(DOCUMENTS)
    assert BlockMask.documents(cu_seqlens=offsets) == by_id
    with_empty = torch.tensor([0, 50, 50, 150, 299, 300], dtype=torch.int32)
    assert BlockMask.documents(cu_seqlens=with_empty) == by_id
    longer = elements(BlockMask.documents(cu_seqlens=offsets, length=330), 330, 330)
    assert torch.equal(longer[..., :300, :300], elements(by_id, 300, 300))
    assert not longer[..., 300:, :].any()
    assert not longer[..., 300:].any()
    several = BlockMask.documents(torch.stack([DOCUMENTS, DOCUMENTS.flip(0)]))
    assert torch.equal(elements(several, 300, 300)[1], elements(by_id, 300, 300)[0].flip(1, 2))


def test_starts_and_prefixes_of_each_sequence() -> None:
    padding = elements(BlockMask.padding(USED, 70, 130, leftpad_k=torch.tensor([3, 37])), 70, 130)
    j = torch.arange(130)
    assert torch.equal(padding[0, 0], ((j >= 3) & (j < 100)).expand(70, -1))
    assert not padding[1].any()
    prefix = elements(BlockMask.prefix(torch.tensor([5, 110]), 70, 130), 70, 130)
    for mask, length in zip(prefix[:, 0], (5, 110), strict=True):
        assert torch.equal(mask, (j < length) | (j <= torch.arange(70)[:, None] + 60))


def test_bad_masks_are_refused() -> None:
    for make, message in (
        (lambda: BlockMask.documents(torch.tensor([0, 1, 0])), "document_id: expected equal numbers to stand together"),
        (lambda: BlockMask.documents(torch.rand(3)), "document_id: expected an int32 or int64 tensor of 1 or 2 dim"),
        (lambda: BlockMask.documents(), "document_id, cu_seqlens: expected one of them"),
        (lambda: BlockMask.documents(DOCUMENTS, length=3), "length: expected None beside document_id, got 3"),
        (lambda: BlockMask.documents(cu_seqlens=torch.tensor([0, 5, 4])), "cu_seqlens: expected rising offsets"),
        (lambda: BlockMask.documents(cu_seqlens=torch.tensor([0, 5]), length=4), "length: expected at least the end"),
        (lambda: BlockMask.padding(torch.rand(2), 70), "seqused_k: expected an int32 or int64 tensor of 1 dim"),
        (lambda: BlockMask.prefix(torch.rand(2), 70), "prefix_length: expected an int32 or int64"),
        (lambda: BlockMask.window(70, 70, (3,)), "window: expected"),  # type: ignore[arg-type]
        (lambda: BlockMask.causal(70, block_size=(32, 32)), "block_size: expected 64 or 128 on each side"),
        (lambda: BlockMask.causal(70) & BlockMask.causal(71), "&: expected masks of the same blocks and lengths"),
        (lambda: BlockMask.from_bounds(torch.zeros(1, 1, 9, 2), (9, 9)), "row_bounds: expected an int32 tensor"),
        (lambda: BlockMask.from_bounds(torch.zeros(1, 1, 8, 2).int(), (9, 9)), "row_bounds: expected 9 rows or 1"),
    ):
        with pytest.raises(RuntimeError, match=f"^{message}"):
            make()


# Taken from flex_attention --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [(128, 128), (64, 128)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_masks_of_flex(lengths: tuple[int, int], block_size: tuple[int, int]) -> None:
    for name, mod in (mods(*lengths) | OTHERS).items():
        flex = create_block_mask(mod, 2, 3, *lengths, device="cpu", BLOCK_SIZE=block_size)
        mask, is_causal = BlockMask.from_flex(flex)
        expected, causal = (of_mod(x, 2, 3, *lengths) for x in (mod, mods(*lengths)["causal"]))
        assert is_causal == torch.equal(expected, causal), name  # so is a prefix that the first row sees anyway
        assert (mask.attn_mask is not None) == (name in OTHERS), name
        pairs = elements(mask, *lengths)
        if is_causal:
            assert mask.row_bounds is None
            pairs = pairs.tril(lengths[1] - lengths[0])
        assert torch.equal(pairs, expected), name


def test_mask_mod_is_called_for_partial_blocks_alone() -> None:
    def mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < 300)

    flex = create_block_mask(mod, None, None, 1024, 1024, device="cpu")
    partial = int(flex.kv_num_blocks.sum())
    assert 0 < partial < int(flex.full_kv_num_blocks.sum()) + partial < 64
    seen: list[Tensor] = []

    def recorded(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        shown = result = mod(b, h, i, j)
        while torch._C._functorch.is_batchedtensor(shown):
            shown = torch._C._functorch.get_unwrapped(shown)
        seen.append(shown)
        return result

    flex.mask_mod = recorded
    BlockMask.from_flex(flex)
    assert sum(x.numel() for x in seen) == partial * 128 * 128


def test_gaps_between_blocks_are_no_gaps_of_rows() -> None:
    """A row sees an interval of what is listed, also where the list has holes."""
    visited = torch.tensor([[[[True, False, True, False], [True, False, False, True]]]])
    flex = BlockMask.from_dense(visited, (128, 128)).to_flex(200, 500, is_causal=False)
    flex.mask_mod = lambda b, h, i, j: (j >= 40) & (j < 400 + i)
    flex.kv_num_blocks, flex.full_kv_num_blocks = flex.full_kv_num_blocks, flex.kv_num_blocks
    flex.kv_indices, flex.full_kv_indices = flex.full_kv_indices, flex.kv_indices
    mask, _ = BlockMask.from_flex(flex)
    assert mask.row_bounds is not None
    listed = elements(BlockMask.from_dense(visited, (128, 128)), 200, 500)
    assert torch.equal(elements(mask, 200, 500), listed & of_mod(flex.mask_mod, 1, 1, 200, 500))


def definition(query: Tensor, key: Tensor, value: Tensor, pairs: Tensor, score: str) -> Tensor:
    """PyTorch's own attention with a mask of pairs, and the same for the sigmoid."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if score == "softmax":
        some = pairs.any(-1, keepdim=True)  # a row without keys is NaN there
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=pairs | ~some)
        return output.where(some, 0.0)
    logits = query @ key.mT * query.shape[3] ** -0.5 - math.log(key.shape[2])
    return logits.sigmoid().where(pairs, 0.0) @ value


def check(inputs: dict[str, Tensor], grad_output: Tensor, pairs: Tensor, name: str, **options: Any) -> None:
    """Holds block_sparse_attention and its gradients against float64 and the mask of pairs, causal or not."""
    results = forward_backward(attnx.block_sparse_attention, inputs, grad_output, **options)
    exact, grad = {name: x.double() for name, x in inputs.items()}, grad_output.double()
    plain: dict[str, Any] = {"score": options["score"], "attn_mask": pairs}
    expected = forward_backward(definition, exact, grad, pairs=pairs, score=options["score"])
    baseline = forward_backward(eager, inputs, grad_output, **plain)
    terms = forward_backward(eager, exact, grad, constant_sums=True, **plain)
    for what, x in results.items():
        sizes = terms[what] if what.startswith("grad_") else None
        dtype = grad_output.dtype
        assert_close(x, expected[what], baseline[what], terms=sizes, name=f"{name}: {what}", dtype=dtype)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("lengths", [(300, 300), (200, 500)], ids=str)
def test_against_the_mask_of_pairs(
    lengths: tuple[int, int], score: str, dtype: torch.dtype, backend: Backend, device: torch.device
) -> None:
    shape = Shape(*lengths, head_dim=64, batch=2, heads=4, kv_heads=2)
    inputs, grad_output = random_inputs(shape, dtype, device)
    for name, mod in (mods(*lengths) | OTHERS).items():
        flex = create_block_mask(mod, 2, 4, *lengths, device="cpu")
        mask, is_causal = BlockMask.from_flex(flex)
        options: dict[str, Any] = {"block_mask": mask.to(device), "score": score, "is_causal": is_causal}
        check(inputs, grad_output, of_mod(mod, 2, 4, *lengths).to(device), name, **options)


@given(data=st.data())
def test_random_lists_and_bounds(data: st.DataObject, device: torch.device, backend: Backend) -> None:
    number = st.integers(1, 260)
    shape = Shape(length_q=data.draw(number), length_k=data.draw(number), batch=2, heads=2, kv_heads=1)
    lengths = shape.length_q, shape.length_k
    seed, size = data.draw(st.integers(0, 999)), data.draw(st.sampled_from(BLOCK_SIZES))
    inputs, grad_output = random_inputs(shape, backend.dtypes()[0], device, seed)
    draw = torch.Generator().manual_seed(seed)
    rows = lengths[0] if data.draw(st.booleans()) else 1
    bounds = torch.randint(-20, lengths[1] + 20, (1, 2, rows, 2), generator=draw, dtype=torch.int32)
    blocks = (-(-length // block) for length, block in zip(lengths, size, strict=True))
    lists = BlockMask.from_dense(torch.rand(2, 1, *blocks, generator=draw) < 0.6, size, lengths)
    mask = replace(lists, row_bounds=bounds)
    pairs = elements(mask, *lengths)
    is_causal, score = data.draw(st.booleans()), data.draw(st.sampled_from(["softmax", "sigmoid"]))
    pairs = pairs.tril(lengths[1] - lengths[0]) if is_causal else pairs
    options: dict[str, Any] = {"block_mask": mask.to(device), "score": score, "is_causal": is_causal}
    check(inputs, grad_output, pairs.to(device), f"{lengths} {size} {seed}", **options)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_flex_attention_agrees(lengths: tuple[int, int], backend: Backend) -> None:
    """Both ways: its masks in ours, given at the call, and ours in its."""
    inputs, _ = random_inputs(Shape(*lengths, batch=2, heads=2), torch.float64, torch.device("cpu"))
    for name, mod in (mods(*lengths) | OTHERS).items():
        flex = create_block_mask(mod, 2, 2, *lengths, device="cpu")
        expected = flex_attention(*inputs.values(), block_mask=flex)
        torch.testing.assert_close(attnx.block_sparse_attention(**inputs, block_mask=flex), expected, msg=name)
        ours, is_causal = BlockMask.from_flex(flex)
        back = ours.to_flex(is_causal=is_causal)
        torch.testing.assert_close(flex_attention(*inputs.values(), block_mask=back), expected, msg=name)
        again, _ = BlockMask.from_flex(back)
        assert torch.equal(elements(again, *lengths), elements(ours, *lengths)), name
    for mask in made(lengths, (128, 128)).values():
        actual = attnx.block_sparse_attention(**inputs, block_mask=mask)
        torch.testing.assert_close(flex_attention(*inputs.values(), block_mask=mask.to_flex()), actual)


@pytest.mark.backends("cpu")
def test_masks_of_pairs_beside_that_of_a_call(backend: Backend) -> None:
    inputs, grad_output = random_inputs(Shape(130, 130), torch.float64, torch.device("cpu"))
    mask, _ = BlockMask.from_flex(create_block_mask(OTHERS["dilated"], None, None, 130, 130, device="cpu"))
    added = torch.randn(2, 130, 130, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaves = inputs | {"attn_mask": added}
    actual = forward_backward(attnx.block_sparse_attention, leaves, grad_output, block_mask=mask)
    pairs = elements(mask, 130, 130)
    expected = forward_backward(
        lambda attn_mask, **x: attnx.softmax_attention(**x, attn_mask=attn_mask.masked_fill(~pairs, -torch.inf)),
        leaves,
        grad_output,
    )
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name], msg=name)
    both = attnx.block_sparse_attention(**inputs, block_mask=mask, attn_mask=added > 0)
    torch.testing.assert_close(both, attnx.softmax_attention(**inputs, attn_mask=(added > 0) & pairs))


@given(data=st.data())
def test_any_intervals(data: st.DataObject) -> None:
    """What from_flex derives is the mask, whatever intervals rows have, and what ``&`` leaves is what both show."""
    lengths = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    size = data.draw(st.sampled_from(BLOCK_SIZES))
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    masks = []
    for _ in range(2):
        bounds = torch.randint(-20, lengths[1] + 20, (1, 2, lengths[0], 2), generator=draw, dtype=torch.int32)
        mask = BlockMask.from_bounds(bounds, lengths, size)
        assert torch.equal(elements(mask, *lengths), within(bounds, lengths[1]))
        again, is_causal = BlockMask.from_flex(mask.to_flex())
        assert again.attn_mask is None
        pairs = elements(again, *lengths)
        assert torch.equal(
            pairs.tril(lengths[1] - lengths[0]) if is_causal else pairs, within(bounds, lengths[1]) & pairs
        )
        masks.append(mask)
    a, b = masks
    assert torch.equal(elements(a & b, *lengths), elements(a, *lengths) & elements(b, *lengths))


# As a structure -------------------------------------------------------------------------------------------------------


def some_masks() -> list[attnx.BlockMask]:
    dilated, _ = BlockMask.from_flex(create_block_mask(OTHERS["dilated"], None, None, 256, 256, device="cpu"))
    return [BlockMask.window(256, 256, (70, 9)), dilated]


def test_structure() -> None:
    for mask in some_masks():
        leaves, spec = pytree.tree_flatten(mask)
        assert pytree.tree_unflatten(leaves, spec) == mask
        saved = io.BytesIO()
        torch.save(mask, saved)
        saved.seek(0)
        assert torch.load(saved, weights_only=True) == mask
        moved = mask.to("meta")
        tensors = [x for x in pytree.tree_leaves(moved) if isinstance(x, Tensor)]
        assert len(tensors) == 3
        assert {x.device.type for x in tensors} == {"meta"}
        assert mask.to("cpu") is mask
        assert mask != BlockMask(mask.kv_num_blocks, mask.kv_indices, mask.block_size, mask.lengths)
        assert mask != moved


@pytest.mark.backends("cpu")
def test_compiled_and_exported_calls(backend: Backend) -> None:
    inputs = list(random_inputs(Shape(256, 256), torch.float32, torch.device("cpu"))[0].values())

    class Attend(torch.nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: attnx.BlockMask) -> Tensor:
            output = attnx.block_sparse_attention(query, key, value, mask)
            assert isinstance(output, Tensor)
            return output

    for mask in some_masks():
        expected = Attend()(*inputs, mask)
        torch._dynamo.reset()
        compiled = torch.compile(Attend(), fullgraph=True, backend="eager")
        assert torch.equal(compiled(*inputs, mask), expected)
        program = torch.export.export(Attend(), (*inputs, mask)).module()
        assert torch.equal(program(*inputs, mask), expected)


def test_explain(device: torch.device, dtype: torch.dtype) -> None:
    """What a mask hides within blocks shows among what a call requires."""
    x = torch.zeros(1, 2, 256, 64, device=device, dtype=dtype)
    window, dilated = (mask.to(device) for mask in some_masks())
    for mask, feature in ((window, "row_bounds"), (dilated, "attn_mask")):
        arguments = {"query": x, "key": x, "row_bounds": mask.row_bounds, "attn_mask": mask.attn_mask}
        assert feature in attnx._capability.Requirement.of("block_sparse_attention", arguments).features
        assert attnx.explain(attnx.block_sparse_attention, x, x, x, mask).supported
