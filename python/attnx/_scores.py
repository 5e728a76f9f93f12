"""The scores, and how operators take what users say of one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, NoReturn, TypeAlias

from torch import Tensor

from attnx._policies import SCORES, ScoreName

SigmoidBias: TypeAlias = Tensor | float | Literal["row"] | None


class ScoreArguments(NamedTuple):
    """A score as operators take it: it adds rule + value + tensor to every logit."""

    score: ScoreName
    bias: Tensor | None
    bias_rule: str
    bias_value: float


def resolve_score(
    score: ScoreName,
    bias: SigmoidBias = None,
    *,
    sink: Tensor | None = None,
    return_logsumexp: bool = False,
    tensor_bias: bool = False,
    default_rule: Literal["length", "row"] = "length",
) -> ScoreArguments:
    """The operator arguments for a user's ``score``, ``bias`` and ``return_logsumexp``.

    Args:
        score: the name of the score.
        bias: the bias, for a score that takes one.
        sink: the sink, for a score that takes one; it chooses a variant of the score, and is an argument of its own.
        return_logsumexp: whether the caller wants it; normalised scores alone have it.
        tensor_bias: whether the operator takes a tensor as bias.
        default_rule: what ``bias=None`` adds: -log of the key length, or of the number of keys that the row sees.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.
    """
    if score not in tuple(SCORES):
        raise RuntimeError(f"score: expected {_either(SCORES)}, got {score!r}")
    if return_logsumexp and not SCORES[score].normalised:
        normalised = [name for name in SCORES if SCORES[name].normalised]
        raise RuntimeError(
            f"return_logsumexp: expected False, or True with score={_either(normalised)}, got True with {score!r}"
        )
    if sink is not None and "sink" not in SCORES[score].parameters:
        takes = [name for name in SCORES if "sink" in SCORES[name].parameters]
        raise RuntimeError(f"sink: expected None, or a tensor with score={_either(takes)}, got one with {score!r}")
    if isinstance(bias, Tensor) and not tensor_bias:
        _refuse_bias('None, "row" or a float', bias)
    if "bias" not in SCORES[score].parameters:
        if bias is not None:
            _refuse_bias(f'None with score="{score}"', bias)
        return ScoreArguments(score, None, "none", 0.0)
    if bias is None:
        return ScoreArguments(score, None, default_rule, 0.0)
    if isinstance(bias, Tensor):
        return ScoreArguments(score, bias, "none", 0.0)
    if bias == "row":
        return ScoreArguments(score, None, "row", 0.0)
    if isinstance(bias, (int, float)) and not isinstance(bias, bool):
        return ScoreArguments(score, None, "none", float(bias))
    numbers = 'None, "row", a float, or a tensor of shape () or (heads,)' if tensor_bias else 'None, "row" or a float'
    _refuse_bias(numbers, bias)


def _refuse_bias(expected: str, bias: object) -> NoReturn:
    got = f"a tensor of shape {tuple(bias.shape)}" if isinstance(bias, Tensor) else repr(bias)
    raise RuntimeError(f"bias: expected {expected}, got {got}")


def _either(names: Iterable[str]) -> str:
    *others, last = (f'"{name}"' for name in names)
    return f"{', '.join(others)} or {last}" if others else last
