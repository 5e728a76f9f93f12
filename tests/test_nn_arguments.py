"""The arguments that all attention modules share look as if each module had them of its own."""

from __future__ import annotations

import inspect
import pydoc
from typing import Any

import pytest
import torch
from torch import nn

from attnx.nn import (
    HeadRoutedAttention,
    HierarchicalSparseAttention,
    ProbabilisticAttention,
    RoutingAttention,
    SigmoidAttention,
    SparseLinearAttention,
)
from attnx.nn.arguments import DEFAULTS, ProjectionArguments
from attnx.nn.projections import ProjectedAttention

MODULES: dict[Any, tuple[int, ...]] = {
    ProjectedAttention: (24, 4),
    SigmoidAttention: (24, 4),
    SparseLinearAttention: (24, 4),
    ProbabilisticAttention: (24, 4),
    RoutingAttention: (24, 4, 3),
    HierarchicalSparseAttention: (24, 4),
    HeadRoutedAttention: (24, 4),
}
EVERY = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)


def test_each_has_a_type_and_a_default() -> None:
    assert list(DEFAULTS) == list(ProjectionArguments.__annotations__)


@EVERY
def test_signature_shows_them(module: Any) -> None:
    shown = inspect.signature(module).parameters
    assert [x for x in shown.values() if x.kind is inspect.Parameter.VAR_KEYWORD] == []
    assert list(shown)[: len(MODULES[module])] == ["embed_dim", "num_heads", "num_clusters"][: len(MODULES[module])]
    for name, default in DEFAULTS.items():
        assert shown[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert shown[name].default is default
        assert shown[name].annotation == ProjectionArguments.__annotations__[name]
    assert shown["num_kv_heads"].annotation == int | None
    assert shown["norm_layer"].annotation == type[nn.Module]


@EVERY
def test_help_describes_them(module: Any) -> None:
    text = pydoc.render_doc(module, renderer=pydoc.plaintext)
    assert "{projection" not in text
    arguments = text.partition("Args:\n")[2].partition(" Raises:\n")[0].replace(" | ", "")
    for name in DEFAULTS:
        assert f"     {name}: " in arguments, name
    assert "a module becomes a submodule" in arguments
    assert "linear_bias: bool = False" in text


@EVERY
def test_others_are_refused_as_python_does(module: Any) -> None:
    def function(*, known: int = 0) -> None: ...

    with pytest.raises(TypeError) as of_python:
        function(dropout=0.1)  # type: ignore[call-arg]
    expected = str(of_python.value).replace(function.__qualname__, f"{module.__name__}.__init__")
    with pytest.raises(TypeError) as error:
        module(*MODULES[module], qk_norm=True, dropout=0.1)
    assert str(error.value) == expected


@EVERY
def test_each_does_what_it_says(module: Any) -> None:
    made = module(
        *MODULES[module],
        num_kv_heads=2,
        head_dim=10,
        linear_bias=True,
        qk_norm=True,
        output_norm=True,
        norm_layer=nn.RMSNorm,
        rotary=nn.Identity(),
        device="meta",
        dtype=torch.bfloat16,
    )
    assert (made.num_kv_heads, made.head_dim, made.q_proj.bias.shape) == (2, 10, (40,))
    assert all(isinstance(norm, nn.RMSNorm) for norm in (made.q_norm, made.k_norm, made.output_norm))
    assert isinstance(made.rotary, nn.Identity)
    assert all((x.dtype, x.device.type) == (torch.bfloat16, "meta") for x in made.parameters())
