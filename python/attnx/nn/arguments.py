"""The arguments that the attention modules share."""

# Annotations are values here, and no text, since signatures show them.
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import TypedDict

Rotary: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class ProjectionArguments(TypedDict, total=False):
    """The arguments of :class:`attnx.nn.projections.ProjectedAttention`, each of which is a keyword.

    Attributes:
        num_kv_heads: key and value heads, a divisor of num_heads; num_heads by default.
        head_dim: features of a head; embed_dim / num_heads by default.
        context_dim: features of a token of the context, of which keys and values are made; embed_dim by default.
        linear_bias: whether the four projections have a bias.
        qk_norm: whether every head's query and key are normalised over head_dim, ahead of ``rotary``.
        output_norm: whether every head's output is normalised over head_dim, ahead of the output projection.
        norm_layer: what ``qk_norm`` and ``output_norm`` build, ``torch.nn.LayerNorm`` or ``torch.nn.RMSNorm``.
        rotary: (query, key) -> (query, key), both (batch, heads, length, head_dim), called ahead of the attention;
            a module becomes a submodule.
        device: the device of the parameters and buffers.
        dtype: the dtype of the parameters.
    """

    num_kv_heads: int | None
    head_dim: int | None
    context_dim: int | None
    linear_bias: bool
    qk_norm: bool
    output_norm: bool
    norm_layer: type[nn.Module]
    rotary: Rotary | None
    device: torch.device | str | None
    dtype: torch.dtype | None


DEFAULTS = ProjectionArguments(
    num_kv_heads=None,
    head_dim=None,
    context_dim=None,
    linear_bias=False,
    qk_norm=False,
    output_norm=False,
    norm_layer=nn.LayerNorm,
    rotary=None,
    device=None,
    dtype=None,
)

_Module = TypeVar("_Module", bound=type[nn.Module])


def shows_projection_arguments(module: _Module) -> _Module:
    """Spells out what ``**projection: Unpack[ProjectionArguments]`` stands for, in the signature and the docstring.

    The docstring has a line ``{projection_arguments}`` where the shared ones belong.
    """
    signature = inspect.signature(module.__init__)
    own = [x for x in signature.parameters.values() if x.kind is not inspect.Parameter.VAR_KEYWORD]
    types = ProjectionArguments.__annotations__
    shared = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=types[name])
        for name, default in DEFAULTS.items()
    ]
    module.__init__.__signature__ = signature.replace(parameters=own + shared)
    if module.__doc__ and ProjectionArguments.__doc__:  # python -OO leaves docstrings out
        text = textwrap.dedent(ProjectionArguments.__doc__.partition("Attributes:\n")[2]).rstrip()
        module.__doc__ = re.sub(
            r"^( *)\{projection_arguments\}$", lambda line: textwrap.indent(text, line[1]), module.__doc__, flags=re.M
        )
    return module


def complete(module: nn.Module, given: ProjectionArguments) -> ProjectionArguments:
    """The given arguments and the defaults of the others.

    Raises:
        TypeError: there is no such argument; Python says the same of other functions.
    """
    for name in given:
        if name not in DEFAULTS:
            raise TypeError(f"{type(module).__name__}.__init__() got an unexpected keyword argument {name!r}")
    return DEFAULTS | given
