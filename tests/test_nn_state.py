"""Modules built without memory, copied, pickled, saved, and with a share of their heads."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnx.nn import (
    AffineScaledAttention,
    BasedAttention,
    BoundaryPredictor,
    DiscreteKeyValueBottleneck,
    GatedDeltaNet,
    HeadRoutedAttention,
    HierarchicalSparseAttention,
    HybridChunkAttention,
    ProbabilisticAttention,
    RoutingAttention,
    SigmoidAttention,
    SoftplusAttention,
    SparseLinearAttention,
)

pytestmark = pytest.mark.backends("cpu")


class Boundaries(BoundaryPredictor):
    """It takes tokens as those of one head."""

    def __init__(self, **options: Any) -> None:
        super().__init__(24, **options)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, None])


KEEP = torch.tensor([1.0, 0.5, 0.25])
MODULES: dict[str, Callable[..., nn.Module]] = {
    "sigmoid": lambda **x: SigmoidAttention(24, 4, alibi=True, bias="trainable", bias_length=9, qk_norm=True, **x),
    "alibi_trained": lambda **x: SigmoidAttention(24, 4, alibi="trainable", **x),
    "sparse_linear": lambda **x: SparseLinearAttention(24, 4, output_norm=True, **x),
    "sparse_linear_sla2": lambda **x: SparseLinearAttention(24, 4, mix="sla2", linear_bias=True, **x),
    "softplus": lambda **x: SoftplusAttention(24, 4, sharpen=3, is_causal=True, **x),
    "affine": lambda **x: AffineScaledAttention(24, 4, is_causal=True, **x),
    "based": lambda **x: BasedAttention(24, 4, **x),
    "based_window": lambda **x: BasedAttention(24, 4, window=5, **x),
    "gated_delta_net": lambda **x: GatedDeltaNet(24, 2, head_dim=6, **x),
    "hybrid_chunk": lambda **x: HybridChunkAttention(24, 4, num_groups=2, **x),
    "bottleneck": lambda **x: DiscreteKeyValueBottleneck(24, 4, 10, **x),
    "bottleneck_projected": lambda **x: DiscreteKeyValueBottleneck(24, 3, 10, key_dim=5, **x),
    "boundaries": lambda **x: Boundaries(hidden=8, **x),
    "head_routed": lambda **x: HeadRoutedAttention(24, 4, **x),
    "hierarchical": lambda **x: HierarchicalSparseAttention(
        24, 4, budget=4, block_size=2, recent=2, chunk_length=3, **x
    ),
    "probabilistic": lambda **x: ProbabilisticAttention(24, 4, eval_seed=3, **x),
    "probabilistic_table": lambda **x: ProbabilisticAttention(24, 4, keep=KEEP, eval_seed=3, **x),
    "routing": lambda **x: RoutingAttention(24, 4, 3, num_memory=2, cluster_size=5, **x),
}
EVERY = pytest.mark.parametrize("name", MODULES)


def output_of(module: nn.Module) -> Tensor:
    with torch.no_grad():
        return module.eval()(torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0)))


@EVERY
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_from_meta(name: str, assign: bool, backend: object) -> None:
    """Large models are loaded so: what has no memory yet gets some, whatever it holds, and then all of the state."""
    trained = MODULES[name]()
    with torch.no_grad():
        for x in trained.parameters():
            x.add_(torch.randn_like(x) / 8)
    module = MODULES[name](device="meta")
    assert {x.device.type for x in module.state_dict().values()} == {"meta"}
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for x in (*module.parameters(), *module.buffers()):
            x.fill_(torch.nan)
    module.load_state_dict(trained.state_dict(), assign=assign)
    assert torch.equal(output_of(module), output_of(trained))


@EVERY
def test_copies(name: str, backend: object) -> None:
    module = MODULES[name]()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]
    for other in copies:
        assert repr(other) == repr(module)
        assert torch.equal(output_of(other), output_of(module))


@pytest.fixture
def group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group([0])
    dist.destroy_process_group()


def test_copies_know_their_process_group(group: Any, backend: object) -> None:
    """Training moves the centroids of each copy as it moves those of the module."""
    module = RoutingAttention(24, 4, 3, cluster_size=5, process_group=group)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]
    before = module.centroids.clone()
    x = torch.randn(2, 9, 24)
    for other in (module, *copies):
        other.train()(x).sum().backward()
        assert torch.equal(other.centroids, module.centroids)
    assert not torch.equal(module.centroids, before)


def test_a_group_that_is_gone_is_named(backend: object) -> None:
    module = RoutingAttention(24, 4, 3, cluster_size=5, process_group="elsewhere")
    with pytest.raises(RuntimeError, match="elsewhere"):
        module(torch.randn(2, 9, 24)).sum().backward()


def share(module: nn.Module, part: int) -> nn.Module:
    """Half of the heads, as tensor parallelism shards the projections: by rows, the last one by columns."""
    module = copy.deepcopy(module)
    for name in ("q_proj", "k_proj", "v_proj"):
        projection = getattr(module, name)
        projection.weight = nn.Parameter(projection.weight.chunk(2)[part])
    out = module.out_proj
    assert isinstance(out, nn.Linear)
    out.weight = nn.Parameter(out.weight.chunk(2, dim=1)[part])
    return module


@pytest.mark.parametrize("name", ["plain", "grouped", "probabilistic", "sparse_linear"])
def test_heads_are_counted_by_the_projections(name: str, backend: object) -> None:
    made: dict[str, Callable[[], nn.Module]] = {
        "plain": lambda: SigmoidAttention(24, 4, qk_norm=True, output_norm=True),
        "grouped": lambda: SigmoidAttention(24, 4, num_kv_heads=2),
        "affine": lambda **x: AffineScaledAttention(24, 4, is_causal=True, **x),
        "probabilistic": lambda: ProbabilisticAttention(24, 4),
        "sparse_linear": lambda: SparseLinearAttention(24, 4),
    }
    module = made[name]()
    parts = [output_of(share(module, part)) for part in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], output_of(module))


def test_routed_heads_cannot_be_shared_out(backend: object) -> None:
    with pytest.raises(ValueError, match=r"^num_heads: expected projections of all 4 heads, got one of 2; "):
        output_of(share(RoutingAttention(24, 4, 3, cluster_size=5), 0))
