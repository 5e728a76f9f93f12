"""RoutingAttention: how its centroids move, alone, compiled, checkpointed and in several processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import attnx
from attnx.nn import RoutingAttention

OPTIONS: dict[str, Any] = {"decay": 0.9, "is_causal": True, "window": 7, "num_memory": 2}


Place = dict[str, Any]  # the device and the dtype
CPU: Place = {"device": torch.device("cpu"), "dtype": torch.float32}


@pytest.fixture
def place(device: torch.device, dtype: torch.dtype, deterministic: None) -> Place:
    return {"device": device, "dtype": dtype}


def module(place: Place, seed: int = 0, **options: Any) -> RoutingAttention:
    torch.manual_seed(seed)
    return RoutingAttention(32, 4, 3, **(OPTIONS | options)).to(**place)


def tokens(place: Place, batch: int = 2, length: int = 36, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed)).to(**place)


def tolerance(place: Place) -> dict[str, float]:
    """Roundings in between differ by so much."""
    return {"rtol": 1e-4, "atol": 1e-5} if place["dtype"] == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}


def train(place: Place, attention: Any, steps: int = 3, of: nn.Module | None = None, **options: Any) -> list[Tensor]:
    """Losses of a few steps, and then the parameters and buffers that they lead to."""
    of = attention if of is None else of
    optimizer = torch.optim.SGD(of.parameters(), 0.1)
    losses = []
    for step in range(steps):
        output, commitment = attention(tokens(place, seed=step), return_loss=True, **options)
        loss = output.square().mean() + commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [torch.stack(losses), *(x.detach() for x in of.state_dict().values())]


def assert_same(actual: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_is_the_operators_it_is_made_of(place: Place) -> None:
    attention = module(place, num_kv_heads=2, num_local_heads=2, routing="argmax").eval()
    x = tokens(place)
    query, key, value = attention.project(x, None)
    local = attnx.softmax_attention(query[:, :2], key[:, :1], value[:, :1], is_causal=True, window=(7, -1))
    memory = attention.memory_key, attention.memory_value
    options = {"routing": "argmax", "is_causal": True, "memory_kv": memory}
    routed = attnx.routing_attention(query[:, 2:], key[:, 1:], value[:, 1:], attention.centroids, **options)
    expected = attention.merge(torch.cat((local, routed), 1))
    assert torch.equal(attention(x), expected)
    output, loss = attention(x, return_loss=True)
    assert torch.equal(output, expected)
    assert torch.equal(loss, attnx.commitment_loss(query[:, 2:], key[:, 1:], attention.centroids))


@pytest.mark.parametrize("options", [{}, {"score": "sigmoid"}, {"is_causal": False, "num_local_heads": 0}], ids=str)
def test_every_parameter_learns(options: dict[str, Any], place: Place) -> None:
    attention = module(place, normalize_qk=True, **options)
    output, loss = attention(tokens(place), return_loss=True)
    (output.sum() + loss).backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    attention(tokens(place), context=tokens(place, length=36, seed=3))


def test_a_backward_moves_centroids_and_a_forward_does_not(place: Place) -> None:
    attention = module(place)
    x, before = tokens(place), attention.centroids.clone()
    query, key, _ = attention.project(x, None)
    expected, counts = before.clone(), torch.ones_like(attention.counts)
    attnx.update_centroids_(expected, counts, query[:, 2:], key[:, 2:], decay=0.9)
    of_evaluation = attention.eval()(x)
    assert torch.equal(attention.centroids, before)
    output = attention.train()(x)
    assert torch.equal(output, of_evaluation)
    assert torch.equal(attention.centroids, before)
    output.sum().backward()
    assert torch.equal(attention.centroids, expected)
    assert torch.equal(attention.counts, counts)
    restored = module(place, seed=5)
    restored.load_state_dict(attention.state_dict())
    assert torch.equal(restored.eval()(x), attention.eval()(x))


def test_centroids_stay_float32(place: Place) -> None:
    attention = module(place).bfloat16()
    before = attention.centroids.clone()
    output = attention(tokens(place).bfloat16())
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert attention.centroids.dtype == attention.counts.dtype == torch.float32
    assert not torch.equal(attention.centroids, before)
    assert torch.equal(module(place).double().centroids, module(place).centroids)
    assert copy.deepcopy(attention).half().centroids.dtype == torch.float32


@torch.compiler.config.patch(force_disable_caches=True)
def test_compiled_training_is_the_same(place: Place) -> None:
    torch._dynamo.reset()
    attention = module(place)
    compiled = torch.compile(module(place), fullgraph=True, backend="aot_eager")
    assert_same(train(place, compiled, of=compiled._orig_mod), train(place, attention), **tolerance(place))


class Positional(nn.Module):
    """The reentrant checkpoint passes no keywords on."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.inner = module(place)

    def forward(self, x: Tensor, context: None, return_loss: bool = True) -> Any:
        return self.inner(x, context, return_loss=return_loss)


@pytest.mark.parametrize("form", ["reentrant", "not_reentrant", "compiled"])
def test_checkpointed_training_is_the_same(form: str, place: Place) -> None:
    """The repeated forward takes the same clusters, and centroids move once a step, after it."""
    torch._dynamo.reset()
    plain = Positional(place)
    inner = Positional(place)

    def run(x: Tensor) -> Any:
        return checkpoint(inner, x, None, True, use_reentrant=form == "reentrant")

    function = torch.compile(run, fullgraph=True, backend="aot_eager") if form == "compiled" else run
    expected = train(place, lambda x, return_loss: plain(x, None, return_loss), of=plain)
    # The reentrant form wants an input that requires a gradient.
    actual = train(place, lambda x, return_loss: function(x.requires_grad_()), of=inner)
    assert_same(actual, expected, **tolerance(place))


def _distributed(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        # The operator, on half of the data each.
        query, key = (torch.randn(4, 2, 36, 8, generator=torch.Generator().manual_seed(s)) for s in (3, 4))
        half = slice(2 * rank, 2 * rank + 2)
        centroids, counts = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(5)), torch.ones(2, 5)
        for _ in range(4):
            attnx.update_centroids_(centroids, counts, query[half], key[half], decay=0.9, group=dist.group.WORLD)
        # The module under DistributedDataParallel, plain and compiled.
        results = {"centroids": centroids, "counts": counts}
        for name in ("plain", "compiled"):
            torch._dynamo.reset()
            attention = module(CPU, process_group="world")
            inside: Any = attention
            if name == "compiled":
                inside = torch.compile(attention, fullgraph=True, backend="aot_eager")
            parallel = DistributedDataParallel(inside)
            optimizer = torch.optim.SGD(attention.parameters(), 0.1)
            for step in range(3):
                x = tokens(CPU, batch=4, seed=step)[half]
                loss = parallel(x).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            results |= {f"{name}.{key}": x.detach() for key, x in attention.state_dict().items()}
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.backends("cpu")
@pytest.mark.usefixtures("device")
def test_two_processes_end_where_one_does(tmp_path: Path) -> None:
    mp.spawn(_distributed, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name
    query, key = (torch.randn(4, 2, 36, 8, generator=torch.Generator().manual_seed(s)) for s in (3, 4))
    centroids, counts = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(5)), torch.ones(2, 5)
    for _ in range(4):
        attnx.update_centroids_(centroids, counts, query, key, decay=0.9)
    torch.testing.assert_close(first["centroids"], centroids)
    torch.testing.assert_close(first["counts"], counts)
    attention = module(CPU)
    optimizer = torch.optim.SGD(attention.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        attention(tokens(CPU, batch=4, seed=step)).square().mean().backward()
        optimizer.step()
    for name in ("plain", "compiled"):
        for key_, x in attention.state_dict().items():
            torch.testing.assert_close(first[f"{name}.{key_}"], x, rtol=1e-4, atol=1e-5)


@pytest.mark.backends("cpu")
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clusters": 0}, "num_clusters: expected a positive int, got 0"),
        ({"num_local_heads": 4}, "num_local_heads: expected a multiple of 1"),
        ({"num_kv_heads": 2, "num_local_heads": 1}, "num_local_heads: expected a multiple of 2"),
        ({"window": 0}, "window: expected a positive int, got 0"),
        ({"decay": 1.5}, "decay: expected from 0 to 1, got 1.5"),
        ({"num_memory": -1}, "num_memory: expected an int, 0 or more, got -1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        RoutingAttention(**({"embed_dim": 32, "num_heads": 4, "num_clusters": 3} | options))


def test_an_indivisible_length_leaves_centroids_unchanged(place: Place) -> None:
    attention = module(place)
    before = attention.centroids.clone()
    with pytest.raises(RuntimeError, match=r"^cluster_size: expected a number where the 35 rows of query are not"):
        attention(tokens(place, length=35))
    assert torch.equal(attention.centroids, before)
