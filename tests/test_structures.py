"""BlockMask, SparseLinearMap, Routes and StaircaseCache as arguments of exported programs, compared and moved."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

import attnx
from cases import Shape, random_inputs
from routing_cases import random_centroids
from staircase_cases import cache_of

SHAPE = Shape(batch=2, heads=4, kv_heads=2, length_q=70, length_k=130, head_dim=32)


class Structure(NamedTuple):
    make: Callable[..., Any]  # from query, key and value
    attend: Callable[..., Tensor]  # from these and the structure


def make_routes(query: Tensor, key: Tensor, value: Tensor) -> attnx.Routes:
    return attnx.route(query, key, random_centroids(4, 3, 32).to(query.device), cluster_size=20)


STRUCTURES = {
    "BlockMask": Structure(
        lambda q, k, v: attnx.probabilistic_block_mask(2, 4, 70, 130, seed=1, offset=0, device=q.device),
        lambda q, k, v, mask: attnx.block_sparse_attention(q, k, v, mask),
    ),
    "SparseLinearMap": Structure(
        lambda q, k, v: attnx.sparse_linear_block_map(q, k),
        lambda q, k, v, block_map: torch.cat(attnx.sparse_linear_attention(q, k, v, block_map=block_map)),
    ),
    "Routes": Structure(make_routes, lambda q, k, v, routes: attnx.routing_attention(q, k, v, routes)),
    "StaircaseCache": Structure(
        lambda q, k, v: cache_of(k, v, window=32), lambda q, k, v, cache: cache.attend(q, is_causal=False)
    ),
}


@pytest.fixture(params=STRUCTURES)
def structure(request: pytest.FixtureRequest) -> Structure:
    return STRUCTURES[request.param]


@pytest.fixture
def inputs(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return list(random_inputs(SHAPE, dtype, device)[0].values())


def test_is_a_pytree(structure: Structure, inputs: list[Tensor]) -> None:
    made = structure.make(*inputs)
    leaves, tree = pytree.tree_flatten(made)
    again = pytree.tree_unflatten(leaves, pytree.treespec_loads(pytree.treespec_dumps(tree)))
    assert type(again) is type(made)
    assert repr(again) == repr(made)
    assert torch.equal(structure.attend(*inputs, again), structure.attend(*inputs, made))
    assert len({str(path) for path, _ in pytree.tree_flatten_with_path(made)[0]}) == len(leaves)
    assert any(isinstance(x, Tensor) for x in leaves)


@pytest.mark.backends("cpu")
def test_export_takes_it(structure: Structure, inputs: list[Tensor]) -> None:
    """The exported program is saved and loaded, too."""

    class Model(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, structure: Any) -> Tensor:
            return structure_of.attend(query, key, value, structure)

    structure_of, made = structure, structure.make(*inputs)
    file = io.BytesIO()
    torch.export.save(torch.export.export(Model(), (*inputs, made)), file)
    file.seek(0)
    program = torch.export.load(file).module()
    others = list(random_inputs(SHAPE, inputs[0].dtype, inputs[0].device, seed=7)[0].values())
    again = structure.make(*others)
    assert torch.equal(program(*others, again), structure.attend(*others, again))


@pytest.mark.backends("cpu")
def test_exported_append_changes_the_cache(inputs: list[Tensor]) -> None:
    class Decode(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, cache: attnx.StaircaseCache) -> Tensor:
            cache.append(key, value)
            output = cache.attend(query)
            assert isinstance(output, Tensor)
            return output

    query, key, value = inputs
    caches = [cache_of(key, value, window=32) for _ in range(3)]
    step = query[:, :, :1], key[:, :, :1], value[:, :, :1]
    program = torch.export.export(Decode(), (*step, caches[0])).module()
    for _ in range(2):
        assert torch.equal(program(*step, caches[1]), Decode()(*step, caches[2]))
    assert caches[1].length == caches[2].length == key.shape[2] + 2


def test_comparison_answers(inputs: list[Tensor]) -> None:
    for name in ("BlockMask", "SparseLinearMap", "Routes"):
        a, b = (STRUCTURES[name].make(*inputs) for _ in range(2))
        others = list(random_inputs(SHAPE, inputs[0].dtype, inputs[0].device, seed=7)[0].values())
        assert a == b
        assert not (a != b)  # noqa: SIM202  (it has a method of its own)
        assert hash(a) == hash(b)
        assert a != 3
        if name != "BlockMask":
            assert a != STRUCTURES[name].make(*others)


def test_masks_differ_by_what_they_list() -> None:
    visited = torch.tensor([[[[True, False, True], [True, True, False]]]])
    mask = attnx.BlockMask.from_dense(visited)
    assert mask == attnx.BlockMask(mask.kv_num_blocks, mask.kv_indices[..., :2])  # what is not used does not count
    assert mask != attnx.BlockMask.from_dense(~visited)
    assert mask != attnx.BlockMask.from_dense(visited, (128, 64))
    assert mask != attnx.BlockMask.from_dense(visited, lengths=(128, 190))
    assert mask != mask.to("meta")


def test_moves(structure: Structure, inputs: list[Tensor], device: torch.device) -> None:
    made = structure.make(*inputs)
    moved = made.to("meta")
    assert type(moved) is type(made)
    assert {x.device.type for x in pytree.tree_leaves(moved) if isinstance(x, Tensor)} == {"meta"}
    back = made.to(device)
    assert torch.equal(structure.attend(*inputs, back), structure.attend(*inputs, made))


# Lengths --------------------------------------------------------------------------------------------------------------


def tokens(length_q: int, length_k: int) -> list[Tensor]:
    return list(random_inputs(Shape(length_q, length_k), torch.float32, torch.device("cpu"))[0].values())


@pytest.mark.backends("cpu")
def test_mask_of_flex_keeps_its_lengths(backend: object) -> None:
    """110 keys have as many blocks as 128, whose mask it is not."""
    flex = create_block_mask(lambda b, h, i, j: j < 110, None, None, 128, 110, device="cpu")
    mask, _ = attnx.BlockMask.from_flex(flex)
    assert mask.lengths == (128, 110)
    for given in (flex, mask):
        with pytest.raises(
            RuntimeError, match=r"^block_mask: expected one of 128 queries and 128 keys, got one of 128 and 110$"
        ):
            attnx.block_sparse_attention(*tokens(128, 128), given)
        expected = attnx.softmax_attention(*tokens(128, 110))
        torch.testing.assert_close(attnx.block_sparse_attention(*tokens(128, 110), given), expected)
    assert mask.to_flex().seq_lengths == (128, 110)
    with pytest.raises(RuntimeError, match=r"^length_k: expected 110 as of the mask, got 128"):
        mask.to_flex(128, 128)
    with pytest.raises(RuntimeError, match=r"^key_blocks: expected 1, as the mask has \(128, 110\) tokens, got 2"):
        mask.to_dense(2)
    with pytest.raises(RuntimeError, match=r"^length_q: expected a number where the mask has no lengths, got None"):
        attnx.BlockMask(mask.kv_num_blocks, mask.kv_indices).to_flex()


@pytest.mark.backends("cpu")
def test_maps_keep_their_lengths(backend: object) -> None:
    query, key, value = tokens(128, 110)
    block_map = attnx.sparse_linear_block_map(query, key)
    assert block_map.lengths == block_map.critical_mask().lengths == (128, 110)
    with pytest.raises(
        RuntimeError, match=r"^block_map: expected one of 128 queries and 128 keys, got one of 128 and 110$"
    ):
        attnx.sparse_linear_attention(*tokens(128, 128), block_map=block_map)
    sampled = attnx.probabilistic_block_mask(1, 2, 100, 110, seed=0, offset=0)
    with pytest.raises(RuntimeError, match=r"^block_mask: expected one of 128 queries and 110 keys, got one of 100"):
        attnx.block_sparse_attention(query, key, value, sampled)


def test_lengths_fit_the_blocks() -> None:
    visited = torch.ones(1, 1, 2, 3, dtype=torch.bool)
    assert attnx.BlockMask.from_dense(visited, lengths=(65, 192)).lengths == (65, 192)
    with pytest.raises(RuntimeError, match=r"^lengths: expected those of 2 blocks of queries and 3 of keys, got"):
        attnx.BlockMask.from_dense(visited, lengths=(65, 193))
