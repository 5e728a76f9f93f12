"""One compiled graph and one exported program serve every length, those of a single block too."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnx
from cases import Shape, random_inputs
from compare import forward_backward

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.usefixtures("backend")]

DRAWN = {"seed": 3, "offset": 1}
CENTROIDS = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0))
INDEX = attnx.log_distance_buckets(1200, 1200, span=8, max_distance=16)
TABLES = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(1))


def packed(attention: Callable[..., Any], **options: Any) -> Callable[..., Tensor]:
    """Two sequences of one length, end to end."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = query.shape[2]
        ends = torch.arange(3, dtype=torch.int32) * length
        x, y, z = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        results = attention(x, y, z, ends, ends, length, length, **options)
        return sum(results) if isinstance(results, tuple) else results

    return attend


def softplus(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attnx.softplus_attention(query, key, value, is_causal=True)


def sharpened_softplus(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attnx.softplus_attention(query, key, value, sharpen=3)


def disentangled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    length = query.shape[2]
    index = INDEX[1200 - length : 1199 + length]
    return attnx.disentangled_attention(query, key, value, index, pos_key=TABLES[0], pos_query=TABLES[1])


def delta_rule(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    log_decay, beta = -key[..., 0].abs(), query[..., 0].sigmoid()
    output, state = attnx.gated_delta_rule(query, key / 4, value, log_decay, beta, return_state=True)
    return output + attnx.gated_delta_rule(query, key / 4, value, log_decay, beta, initial_state=state)


ATTENTIONS: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda query, key, value: attnx.softmax_attention(query, key, value, is_causal=True),
    "softmax packed": packed(attnx.softmax_attention_varlen),
    "sigmoid": lambda query, key, value: attnx.sigmoid_attention(query, key, value, is_causal=True),
    "sigmoid packed": packed(attnx.sigmoid_attention_varlen),
    "sparse-linear": lambda query, key, value: sum(
        attnx.sparse_linear_attention(query, key, value, critical=0.3, is_causal=True)
    ),
    "sparse-linear packed": packed(attnx.sparse_linear_attention_varlen, critical=0.3),
    "probabilistic": lambda query, key, value: attnx.probabilistic_attention(query, key, value, **DRAWN),
    "probabilistic, density": lambda query, key, value: attnx.probabilistic_attention(
        query, key, value, density=0.4, **DRAWN
    ),
    "probabilistic, topm": lambda query, key, value: attnx.probabilistic_attention(
        query, key, value, mode="topm", **DRAWN
    ),
    "routing": lambda query, key, value: attnx.routing_attention(
        query, key, value, CENTROIDS, routing="argmax", is_causal=True
    ),
    "softplus": softplus,
    "sharpened_softplus": sharpened_softplus,
    "disentangled": disentangled,
    "gated delta rule": delta_rule,
    "linear": attnx.linear_attention,
    "key weights": lambda query, key, value: attnx.attention_key_weights(query, key, is_causal=True)[..., None] * value,
}
LENGTHS = (320, 448, 1030, 40, 65)


@pytest.fixture(params=ATTENTIONS)
def attention(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return ATTENTIONS[request.param]


def inputs_of(length: int) -> tuple[dict[str, Tensor], Tensor]:
    return random_inputs(Shape(length, length, head_dim=16, batch=2), torch.float32, torch.device("cpu"))


def test_compiled_once(attention: Callable[..., Tensor]) -> None:
    """Forward and backward, whose results are those of eager mode."""
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in LENGTHS:
        inputs, grad_output = inputs_of(length)
        grad_output = grad_output.reshape(attention(**inputs).shape)
        expected = forward_backward(attention, inputs, grad_output)
        with torch.compiler.set_stance("default" if length == LENGTHS[0] else "fail_on_recompile"):
            results = forward_backward(compiled, inputs, grad_output)
        for name, result in results.items():
            torch.testing.assert_close(result, expected[name], msg=name)


@pytest.mark.parametrize("dim", [torch.export.Dim("length", min=1, max=1200), torch.export.Dim.DYNAMIC], ids=str)
def test_exported_saved_and_loaded(attention: Callable[..., Tensor], dim: Any) -> None:
    class Model(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return attention(query, key, value)

    names = ("query", "key", "value")
    file, dynamic = io.BytesIO(), {name: {2: dim} for name in names}
    torch.export.save(torch.export.export(Model(), (), inputs_of(320)[0], dynamic_shapes=dynamic), file)
    file.seek(0)
    program = torch.export.load(file).module()
    for length in (320, 40, 449):
        inputs, _ = inputs_of(length)
        torch.testing.assert_close(program(**inputs), attention(**inputs))


@pytest.mark.parametrize("mode", ["bernoulli", "topm"])
def test_lists_of_any_length(mode: Any) -> None:
    """Lists have a column for each block, so that torch asks whether there is one alone."""
    torch._dynamo.reset()

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = attnx.probabilistic_block_mask(2, 2, query.shape[2], key.shape[2], density=0.5, mode=mode, **DRAWN)
        critical = attnx.sparse_linear_block_map(query, key, critical=0.5).critical_mask()
        sampled, sparse = (attnx.block_sparse_attention(query, key, value, x) for x in (mask, critical))
        return torch.cat((sampled, sparse))

    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (320, 448, 1030, 65):
        inputs, _ = inputs_of(length)
        with torch.compiler.set_stance("default" if length == 320 else "fail_on_recompile"):
            assert torch.equal(compiled(**inputs), attention(**inputs))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "SigmoidAttention": lambda: attnx.nn.SigmoidAttention(32, 2, is_causal=True, bias="trainable", bias_length=64),
    "SparseLinearAttention": lambda: attnx.nn.SparseLinearAttention(32, 2, critical=0.3),
    "ProbabilisticAttention": lambda: attnx.nn.ProbabilisticAttention(32, 2, density=0.5, mode="topm", eval_seed=1),
    "HeadRoutedAttention": lambda: attnx.nn.HeadRoutedAttention(32, 2, is_causal=True),
    "RoutingAttention": lambda: attnx.nn.RoutingAttention(32, 2, num_clusters=4, routing="argmax", is_causal=True),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_exported_module(make: Callable[[], nn.Module]) -> None:
    module = make().eval()
    file, dim = io.BytesIO(), torch.export.Dim("length", min=1, max=2000)
    torch.export.save(torch.export.export(module, (torch.randn(2, 320, 32),), dynamic_shapes=({1: dim},)), file)
    file.seek(0)
    program = torch.export.load(file).module()
    for length in (320, 40, 449):
        x = torch.randn(2, length, 32)
        torch.testing.assert_close(program(x), module(x))


def test_exported_decode_step() -> None:
    """The cache of one size takes any number of new tokens."""

    class Step(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, cache: attnx.StaircaseCache) -> Tensor:
            cache.append(key, value)
            output = cache.attend(query)
            assert isinstance(output, Tensor)
            return output

    def caches() -> attnx.StaircaseCache:
        return attnx.StaircaseCache(2, 2, 32, 2000, window=64)

    def tokens(length: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(3, 2, 2, length, 32).unbind(0))

    first, dynamic = tokens(70), torch.export.ShapesCollection()
    for x in first:
        dynamic[x] = {2: torch.export.Dim("tokens", min=1, max=2000)}
    file = io.BytesIO()
    torch.export.save(torch.export.export(Step(), (*first, caches()), dynamic_shapes=dynamic), file)
    file.seek(0)
    program = torch.export.load(file).module()
    ours, theirs = caches(), caches()
    for length in (300, 1, 2, 90):
        step = tokens(length)
        assert torch.equal(program(*step, ours), Step()(*step, theirs))
    assert ours.length == theirs.length == 393


def test_solvers_refuse_what_no_function_passes_on() -> None:
    seed, ops = torch.zeros((), dtype=torch.int64), torch.ops.attnx
    for call, message in (
        (lambda: ops.probabilistic_keep(seed, "linear", 0.5, 9, 9, 64, 64, False), "family: expected None or one of "),
        (lambda: ops.probabilistic_keep(seed, "power", 1.5, 9, 9, 64, 64, False), "density: expected a share of the"),
        (lambda: ops.probabilistic_blocks_per_row(seed, None, None, 9, 9, 64, 64, False), "density: expected a share"),
        (lambda: ops.probabilistic_keep(seed, "power", 0.5, 9, 9, 64, 32, False), "block_size: expected 64 or 128"),
        (lambda: ops.probabilistic_keep(seed, "power", 0.5, 9, 2**27, 64, 64, False), "length_k: expected from 0 to"),
    ):
        with pytest.raises(RuntimeError, match=f"^{message}"):
            call()
