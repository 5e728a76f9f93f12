"""PointerHead: its functions between its projections, and what it learns."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import attnx
from attnx import reference
from attnx.nn import PointerHead

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.usefixtures("backend")]


def tokens(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, context = (torch.randn(2, n, m, generator=generator).to(dtype) for n, m in ((7, 24), (9, 20)))
    return x, context, torch.randint(0, 3, (2, 7), generator=generator)


def module(**options: Any) -> PointerHead:
    torch.manual_seed(0)
    return PointerHead(24, context_dim=20, head_dim=16, **({"softcap": 2.0} | options)).double()


HIDES = torch.rand(2, 7, 9, generator=torch.Generator().manual_seed(1)) < 0.3
PADDING = torch.arange(9) >= torch.tensor([[8], [9]])


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("masks", [{}, {"attn_mask": HIDES, "key_padding_mask": PADDING}, {"is_causal": True}], ids=len)
def test_it_is_the_functions(masks: dict[str, Any], softcap: float | None) -> None:
    head, (x, context, target) = module(softcap=softcap, linear_bias=True), tokens()
    query, key = head.q_proj(x)[:, None], head.k_proj(context)[:, None]
    options: dict[str, Any] = {"softcap": softcap}
    if "attn_mask" in masks:
        options["attn_mask"] = ~(HIDES | PADDING[:, None])[:, None]
    options["is_causal"] = "is_causal" in masks
    expected = reference.pointer_log_prob(query, key, target[:, None], **options)[:, 0]
    torch.testing.assert_close(head(x, context, target, **masks), expected)
    assert torch.equal(head.argmax(x, context, **masks), reference.pointer_argmax(query, key, **options)[:, 0])
    drawn = head.sample(x, context, temperature=0.5, seed=1, offset=2, **masks)
    options |= {"temperature": 0.5, "seed": 1, "offset": 2}
    assert torch.equal(drawn, reference.pointer_sample(query, key, **options)[:, 0])


def test_defaults() -> None:
    head = PointerHead(32)
    assert (head.head_dim, head.context_dim, head.softcap, head.q_proj.bias) == (32, 32, 10.0, None)
    assert repr(head).startswith("PointerHead(\n  embed_dim=32, head_dim=32, softcap=10.0")
    other = PointerHead(32, device="meta").to_empty(device="cpu")
    other.load_state_dict(head.state_dict())
    x = torch.randn(1, 5, 32)
    assert torch.equal(other.argmax(x, x), head.argmax(x, x))


def test_it_learns_where_to_point() -> None:
    """Each token is a noisy copy of a place."""
    generator = torch.Generator().manual_seed(2)
    head = PointerHead(16, softcap=10.0)
    torch.manual_seed(1)
    optimiser = torch.optim.Adam(head.parameters(), 1e-2)
    for _ in range(150):
        context = torch.randn(8, 20, 16, generator=generator)
        target = torch.randint(0, 20, (8, 12), generator=generator)
        x = context.gather(1, target[..., None].expand(-1, -1, 16)) + 0.1 * torch.randn(8, 12, 16, generator=generator)
        loss = -head(x, context, target).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert (head.argmax(x, context) == target).double().mean() > 0.9
    assert (head.sample(x, context, seed=0, offset=0) == target).double().mean() > 0.6


def test_compiled() -> None:
    head, (x, context, target) = module(), tokens()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    masks = {"attn_mask": HIDES, "key_padding_mask": PADDING}
    assert torch.equal(compiled(x, context, target, **masks), head(x, context, target, **masks))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 300}, "head_dim: expected at most 256, got 300"),
        ({"softcap": 0.0}, "softcap: expected None or a number above 0, got 0.0"),
        ({"context_dim": 0}, "context_dim: expected a positive int, got 0"),
    ],
    ids=str,
)
def test_bad_module(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        PointerHead(24, **options)


def test_bad_input() -> None:
    head, (x, context, target) = module(), tokens()
    with pytest.raises(ValueError, match=r"^target: expected a tensor of shape \(2, 7\), got \(2, 6\)"):
        head(x, context, target[:, 1:])
    with pytest.raises(ValueError, match=r"^target: expected a tensor of shape \(2, 7\), got None"):
        head(x, context, None)
    with pytest.raises(
        ValueError, match=r"^context: expected \(batch, length, 20\), got a tensor of shape \(2, 7, 24\)"
    ):
        head.argmax(x, x)
    with pytest.raises(ValueError, match=r"^key_padding_mask: expected bool or floating point of shape \(2, 9\)"):
        head.sample(x, context, key_padding_mask=PADDING[:, 1:])
    assert attnx.nn.PointerHead is PointerHead
