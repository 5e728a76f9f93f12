"""Which kernel a call would use and why, or why none and what is nearest."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from attnx import (
    _C,
    _arguments,
    _capability,
    _layouts,
    delta_rule,
    disentangled,
    functional,
    hierarchical,
    linear,
    pointer,
    probabilistic,
    rectified,
    routing,
    softplus,
    sparse_linear,
    staircase,
    weights,
)
from attnx.block_mask import BlockMask

# What a call does whatever kernel serves it, and may surprise.
_NOTES = {"routing_attention": ["a centroid with a NaN has no product that is a number: its cluster holds no token"]}


def _of_lists(arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments | {"block_size": (rectified.BLOCK, rectified.BLOCK)}


def _of_clusters(arguments: dict[str, Any]) -> dict[str, Any]:
    """A block of queries is a cluster, and each query is in one, as of centroids under arg-max routing."""
    blocks = -(-arguments["query"].shape[-2] // arguments["block_size"])
    routes = torch.empty(1, blocks, 0)
    return arguments | {"routes": routes, "routing": "argmax", "is_causal": True, "block_size": (0, 0)}


def _of_packed_clusters(arguments: dict[str, Any]) -> dict[str, Any]:
    """Packed sequences are one entry of a batch to the kernel, with clusters of their own."""
    rows = {name: arguments[name].transpose(0, 1)[None] for name in ("query", "key", "value")}
    return arguments | rows | {"sequences": len(arguments["cu_seqlens_q"]) - 1}


# These are made of an operator, whose kernel is theirs, and of tensor operations. It has these arguments then.
_MADE_OF = {
    "rectified_attention": ("block_sparse_attention", _of_lists),
    "hierarchical_attention": ("routing_attention", _of_clusters),
    "routing_attention_varlen": ("routing_attention", _of_packed_clusters),
}

# These keep everything but rows in float32, products too.
_IN_FLOAT32 = {"gated_delta_rule", "linear_attention"}


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`explain`; ``print`` it."""

    operator: str
    supported: bool
    backend: str | None = None
    kernel: str | None = None
    reasons: list[str] = field(default_factory=list)
    nearest: str | None = None

    def __str__(self) -> str:
        head = f"{self.operator}: " + (f"{self.kernel} on {self.backend}" if self.supported else "no kernel")
        lines = [head, *(f"  - {reason}" for reason in self.reasons)]
        if self.nearest:
            lines.append(f"  nearest: {self.nearest}")
        return "\n".join(lines)


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend and kernel ``function(*args, **kwargs)`` would use and why, or why not and what is nearest.

    Nothing is computed, and the values of the tensors are not looked at.

    Args:
        function: an operator of attnx, such as ``attnx.sigmoid_attention``, or what is made of one, as
            ``attnx.rectified_attention`` is.
        args, kwargs: what it would be called with.

    Returns:
        An :class:`Explanation`: ``supported``, ``backend``, ``kernel``, ``reasons``, ``nearest``.

    Raises:
        ValueError: function is not an operator of attnx.
        TypeError: the arguments do not fit its signature.
    """
    name = getattr(function, "__name__", str(function))
    operator, arguments_of = _MADE_OF.get(name, (name, dict))
    modules = [delta_rule, disentangled, functional, hierarchical, linear, pointer]
    modules += [probabilistic, rectified, routing, softplus, sparse_linear, staircase, weights]
    operators = {row.operator for row in _capability.table()}
    if operator.removesuffix("_varlen") not in operators or all(
        getattr(m, name, None) is not function for m in modules
    ):
        raise ValueError(f"function: expected an operator of attnx, such as attnx.sigmoid_attention, got {function!r}")
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    arguments |= arguments.pop("terms", {})  # disentangled attention takes them as they are named
    if arguments.get("sharpen") is not None:  # it is an operator of its own
        operator = name = f"sharpened_{name}"
    if "cache" in arguments:
        arguments["key"] = arguments["value"] = arguments["cache"]._memory.tail[:, :, 0, 0]
    if isinstance(mask := arguments.get("block_mask"), BlockMask):  # what it hides within blocks are terms, too
        arguments["row_bounds"] = mask.row_bounds
        arguments["attn_mask"] = mask.with_elements(arguments.get("attn_mask"))
    names = ("query", "key", "value")
    is_packed = "cu_seqlens_q" in arguments
    if all(name in arguments for name in names) and name != "gated_delta_rule" and not is_packed:
        arguments |= zip(names, _layouts.four_dimensions(*(arguments[name] for name in names)), strict=True)
    arguments = arguments_of(arguments)
    arguments["window_left"], arguments["window_right"] = _arguments.window(arguments.pop("window", None))
    if not isinstance(arguments.get("bias"), Tensor):
        arguments["bias"] = None  # a rule or a number, which every kernel adds

    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in arguments.values()):
        operator = name = f"{name}_jvp"
    if operator not in operators and operator.removesuffix("_varlen") not in operators:
        return Explanation(name, False, reasons=["an argument has a tangent, and there is no forward-mode derivative"])
    requirement = _capability.Requirement.of(operator, arguments)
    row = _capability.nearest(requirement)
    missing = requirement.missing(row)
    if missing:
        reasons = [f"the call requires {requirement}", f"missing: {', '.join(missing)}"]
        return Explanation(name, False, reasons=reasons, nearest=_capability.describe(row))
    try:
        if row.backend == "cpu":
            kernel, reasons = _cpu_kernel(requirement)
        elif operator.endswith("_jvp"):
            kernel, reasons = _only_kernel(requirement, arguments, "attnx_forward_sm80, with tangents")
        elif "value" in arguments:
            kernel, reasons = _cuda_kernel(requirement, arguments)
        else:
            kernel, reasons = _only_kernel(requirement, arguments, "attnx_sums_sm80")
    except RuntimeError as error:  # the device has no kernel, or there is none
        return Explanation(name, False, reasons=[str(error)], nearest=_capability.describe(row))
    return Explanation(name, True, row.backend, kernel, reasons + _NOTES.get(name, []))


def _cpu_kernel(requirement: _capability.Requirement) -> tuple[str, list[str]]:
    instruction_set = _C.cpu_instruction_set()
    reasons = [
        f"the tensors are on {requirement.backend}",
        f"of the instruction sets built, {', '.join(_C.build_info()['cpu_instruction_sets'])}, this machine runs "
        f"{', '.join(_C.cpu_instruction_sets())}; {instruction_set} is in use",
    ]
    if requirement.dtype in ("bfloat16", "float16"):
        has_pairs = instruction_set == "avx512_bf16" and requirement.operator not in _IN_FLOAT32
        pairs = requirement.dtype == "bfloat16" and has_pairs
        products = "bfloat16 pairs, summed in float32" if pairs else "float32, after converting each tile"
        reasons.append(f"{requirement.dtype} is multiplied as {products}")
    return f"{requirement.operator} [{instruction_set}]", reasons


# These features take a loop of their own on CUDA.
_TERMS = {"attn_mask", "distance_bias", "key_bias", "key_mask", "row_bounds", "softcap", "dropout"}


def _cuda_kernel(requirement: _capability.Requirement, arguments: dict[str, Any]) -> tuple[str, list[str]]:
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    packed = query.dim() == 3
    sizes = {
        "batch": len(arguments["cu_seqlens_q"]) - 1 if packed else query.shape[0],
        "heads_q": query.shape[1],
        "heads_k": key.shape[1],
        "length_q": arguments["max_seqlen_q"] if packed else query.shape[2],
        "length_k": arguments["max_seqlen_k"] if packed else key.shape[2],
        "head_dim": query.shape[-1],
        "value_dim": value.shape[-1],
        "window": (arguments["window_left"], 0 if arguments.get("is_causal") else arguments["window_right"]),
        "packed_rows": (query.shape[0], key.shape[0]) if packed else (0, 0),
        "block_size": mask.block_size if (mask := arguments.get("block_mask")) else arguments.get("block_size", (0, 0)),
        "query": _layout(query),
        "key": _layout(key),
        "value": _layout(value),
        "cache": arguments["cache"]._layout if "cache" in arguments else None,
        "clusters_and_slots": _clusters_and_slots(arguments) if "routes" in arguments else (0, 0),
        "terms": bool(_TERMS & set(requirement.features)),
    }
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        kernel = _C.cuda_forward_kernel(requirement.operator, requirement.dtype, **sizes)
        backward = _backward_kernel(requirement, sizes) if "cache" not in arguments else []
    reasons = _where(query)
    reasons += [*_describe("the forward", kernel), *backward]
    if (asked := _C.cuda_mainloop()) != "auto":
        reasons.append(f"{asked} was asked for, by attnx.cuda_mainloop or ATTNX_CUDA_MAINLOOP")
    return f"{requirement.operator} [{kernel['mainloop']}]", reasons


def _where(query: Tensor) -> list[str]:
    if query.is_cuda:
        major, minor = torch.cuda.get_device_capability(query.device)
        device = f"{torch.cuda.get_device_name(query.device)}, compute capability {major}.{minor}"
        return [f"the tensors are on {query.device}, {device}"]
    return [f"the tensors are on {query.device}, and ATTNX_CUDA_ON_HOST=1 sends their calls to the emulator"]


def _only_kernel(requirement: _capability.Requirement, arguments: dict[str, Any], kernel: str) -> tuple[str, list[str]]:
    """One mainloop serves every device, without a choice."""
    return f"{requirement.operator} [sm80]", [*_where(arguments["query"]), f"the kernel is {kernel}"]


def _backward_kernel(requirement: _capability.Requirement, sizes: dict[str, Any]) -> list[str]:
    try:
        kernel = _C.cuda_backward_kernel(requirement.operator, requirement.dtype, **sizes)
    except RuntimeError as error:  # the mainloop that was asked for has none
        return [f"the backward is refused: {error}"]
    return _describe("the backward", kernel)


def _describe(direction: str, kernel: _C.CudaKernel) -> list[str]:
    tiles = f"{kernel['rows']} rows x {kernel['keys']} keys, head_dim padded to {kernel['head_dim']}"
    aligned = "" if kernel["aligned"] else ", rows not on 16 bytes"
    splits = f", keys in {kernel['splits']} shares" if kernel["splits"] > 1 else ""
    lines = [f"{direction} is {kernel['kernel']}, {tiles}{aligned}{splits}"]
    if kernel["why_not_sm90"]:
        lines.append(f"{direction} is not sm90's: {kernel['why_not_sm90']}")
    return lines


def _clusters_and_slots(arguments: dict[str, Any]) -> tuple[int, int]:
    """How many clusters a head has, and places for queries in all of them."""
    routes, length = arguments["routes"], arguments["query"].shape[2]
    if isinstance(routes, routing.Routes):
        return routes.clusters, routes.query_indices.shape[2]
    clusters, sequences = routes.shape[1], arguments.get("sequences", 1)
    if arguments["routing"] == "argmax":
        return sequences * clusters, length
    size = routing._cluster_size(arguments["cluster_size"], "query", length, clusters)
    return sequences * clusters, clusters * min(sequences * size, length)


def _layout(x: Tensor) -> tuple[int, int, int, int] | None:
    """Its address and strides over batch, heads and rows; None where the operator would copy it first."""
    if x.stride(-1) != 1:
        return None
    batch, heads, rows = (0, x.stride(1), x.stride(0)) if x.dim() == 3 else x.stride()[:3]
    return x.data_ptr(), batch, heads, rows
