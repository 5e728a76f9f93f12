"""What users say of a score is checked and passed on by one function, whatever the attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

import attnx
from attnx._scores import SCORES, ScoreName, resolve_score

X = torch.zeros(1, 1, 64, 32)


def _staircase(**options: Any) -> Any:
    cache = attnx.StaircaseCache(1, 1, 32, 64)
    cache.append(X, X)
    return cache.attend(X, **options)


MASK = attnx.BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool))
# Whether each returns a logsumexp, and whether it takes a tensor as bias.
FUNCTIONS: dict[str, tuple[Callable[..., Any], bool, bool]] = {
    "block_sparse": (lambda **options: attnx.block_sparse_attention(X, X, X, MASK, **options), True, False),
    "probabilistic": (lambda **options: attnx.probabilistic_attention(X, X, X, **options), True, False),
    "routing": (lambda **options: attnx.routing_attention(X, X, X, torch.zeros(1, 2, 32), **options), False, False),
    "staircase": (_staircase, True, True),
}
BAD = {
    "score": ({"score": "relu"}, 'score: expected "sigmoid" or "softmax", got \'relu\''),
    "unhashable_score": ({"score": []}, 'score: expected "sigmoid" or "softmax", got []'),
    "bias_of_softmax": ({"bias": -1.0}, 'bias: expected None with score="softmax", got -1.0'),
    "bias_rule": ({"score": "sigmoid", "bias": "column"}, 'bias: expected None, "row"'),
    "bias_bool": ({"score": "sigmoid", "bias": True}, 'bias: expected None, "row"'),
    "logsumexp_of_sigmoid": (
        {"score": "sigmoid", "return_logsumexp": True},
        "return_logsumexp: expected False, or True with score=\"softmax\", got True with 'sigmoid'",
    ),
    "tensor": (
        {"score": "sigmoid", "bias": torch.zeros(1)},
        'bias: expected None, "row" or a float, got a tensor of shape (1,)',
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
@pytest.mark.parametrize(("function", "has_logsumexp", "tensor_bias"), FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.backends("cpu")
def test_bad_input(
    function: Callable[..., Any],
    has_logsumexp: bool,
    tensor_bias: bool,
    options: dict[str, Any],
    message: str,
    device: torch.device,
) -> None:
    if ("return_logsumexp" in options and not has_logsumexp) or ("tensor" in message and tensor_bias):
        pytest.skip("the function takes no such argument, or takes it")
    with pytest.raises(RuntimeError) as error:
        function(**options)
    assert str(error.value).startswith(message)


def test_what_operators_get() -> None:
    bias = torch.zeros(3)
    assert resolve_score("softmax") == ("softmax", None, "none", 0.0)
    assert resolve_score("sigmoid") == ("sigmoid", None, "length", 0.0)
    assert resolve_score("sigmoid", default_rule="row") == ("sigmoid", None, "row", 0.0)
    assert resolve_score("sigmoid", "row") == ("sigmoid", None, "row", 0.0)
    assert resolve_score("sigmoid", -2) == ("sigmoid", None, "none", -2.0)
    assert resolve_score("sigmoid", bias, tensor_bias=True) == ("sigmoid", bias, "none", 0.0)


def test_scores_are_those_of_the_type() -> None:
    assert tuple(SCORES) == get_args(ScoreName)
