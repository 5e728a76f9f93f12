"""The capability table, and what a call needs of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnx import _C
from attnx._policies import SCORES


@dataclass(frozen=True)
class Capability:
    """What one operator supports on one backend."""

    operator: str
    backend: str
    dtypes: tuple[str, ...]
    head_dim: tuple[int, int]
    features: tuple[str, ...]
    backward: bool


@cache
def table() -> tuple[Capability, ...]:
    rows = json.loads(_C.capabilities())
    return tuple(
        Capability(
            row["operator"],
            row["backend"],
            tuple(row["dtypes"]),
            tuple(row["head_dim"]),
            tuple(row["features"]),
            row["backward"],
        )
        for row in rows
    )


def backend_of(device: torch.device) -> str:
    """The backend, as the table calls it, that serves calls on the tensors of a device."""
    return "cuda" if device.type == "cpu" and _C.cuda_on_host else device.type


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# These arguments each are a feature, and so is the gradient of each: the distances' slopes, the parameters of scores,
# and what is added to or multiplies single pairs and keys.
_TENSORS = {"alibi_slopes": "alibi"} | {name: name for score in SCORES.values() for name in score.parameters}
_TENSORS |= {name: name for name in ("attn_mask", "distance_bias", "key_bias", "key_mask")}


@dataclass(frozen=True)
class Requirement:
    """What a call needs, in the words of the table. Arguments are those of the torch operator, by name."""

    operator: str
    backend: str
    dtype: str
    head_dims: tuple[int, ...]
    features: tuple[str, ...]
    backward: bool

    @classmethod
    def of(cls, operator: str, arguments: dict[str, Any]) -> Requirement:
        query, key = arguments["query"], arguments["key"]
        value = arguments.get("value", key)
        base = operator.removesuffix("_backward").removesuffix("_varlen")
        wanted = {
            "varlen": "cu_seqlens_q" in arguments,
            "grouped_queries": query.dim() > 1 and key.dim() > 1 and query.shape[1] != key.shape[1],
            "grouped_values": key.dim() > 1 and value.dim() > 1 and key.shape[1] != value.shape[1],
            "value_dim": query.shape[-1:] != value.shape[-1:],
            "causal": arguments.get("is_causal", False),
            "window": max(arguments.get("window_left", -1), arguments.get("window_right", -1)) >= 0,
            "key_lengths": any(arguments.get(name) is not None for name in ("seqused_k", "leftpad_k")),
            "row_bounds": arguments.get("row_bounds") is not None,
            "position_offset": arguments.get("position_offset", 0) != 0,
            "padding": arguments.get("has_padding", False),
            "block_bias": arguments.get("block_bias") is not None,
            "block_bias_gradient": _requires_grad(arguments.get("block_bias")),
            "initial_state": arguments.get("initial_state") is not None,
            "carry": arguments.get("carry") is not None,
            "importance": arguments.get("importance", False),
            "softcap": arguments.get("softcap") is not None,
            "dropout": arguments.get("dropout_p", 0.0) > 0,
            "memory_kv": any(arguments.get(name) is not None for name in ("memory_key", "memory_kv")),
        }
        for name, feature in _TENSORS.items():
            argument = arguments.get(name)
            wanted[feature] = argument is not None
            wanted[f"{feature}_gradient"] = _requires_grad(argument)
        return cls(
            operator=base,
            backend=backend_of(query.device),
            dtype=dtype_name(query.dtype),
            head_dims=tuple(x.shape[-1] for x in (query, value) if x.dim()),
            features=tuple(feature for feature, used in wanted.items() if used),
            backward=any(_requires_grad(x) for x in arguments.values()),
        )

    def missing(self, row: Capability) -> list[str]:
        """What this row lacks; the list is empty where the row serves the call."""
        low, high = row.head_dim
        missing = [] if row.backend == self.backend else [f"backend {self.backend}"]
        if row.backend == self.backend == "cuda" and _C.build_info()["cuda"] is None:
            missing.append("CUDA kernels in this build of attnx")
        if self.dtype not in row.dtypes:
            missing.append(f"dtype {self.dtype}")
        missing += [f"head_dim {d}" for d in dict.fromkeys(self.head_dims) if not low <= d <= high]
        missing += [feature for feature in self.features if feature not in row.features]
        if self.backward and not row.backward:
            missing.append("backward")
        return missing

    def __str__(self) -> str:
        dims = ", ".join(f"head_dim {d}" for d in dict.fromkeys(self.head_dims))
        return ", ".join(filter(None, (f"backend {self.backend}", f"dtype {self.dtype}", dims, *self.features)))


def _requires_grad(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.requires_grad


def describe(row: Capability) -> str:
    low, high = row.head_dim
    parts = [f"backend {row.backend}", "dtype " + "/".join(row.dtypes), f"head_dim {low}-{high}", *row.features]
    return ", ".join(parts + ["backward"] * row.backward)


def nearest(requirement: Requirement) -> Capability:
    """The row of the operator that lacks least; of equals, that of the call's backend comes first."""
    rows = [row for row in table() if row.operator == requirement.operator]
    return min(rows, key=lambda row: (len(requirement.missing(row)), row.backend != requirement.backend))


def refusal(operator: str, arguments: dict[str, Any]) -> str:
    """Why no kernel serves the call: what it requires, what is supported, what is missing."""
    requirement = Requirement.of(operator, arguments)
    row = nearest(requirement)
    return (
        f"{requirement.operator}: no kernel for this call.\n"
        f"  required:  {requirement}\n"
        f"  supported: {describe(row)}\n"
        f"  missing:   {', '.join(requirement.missing(row))}"
    )


def require(operator: str, arguments: dict[str, Any]) -> None:
    """Refuses a call ahead of it that needs a feature which the table lacks, where the backward would tell too late."""
    required = Requirement.of(operator, arguments)
    if not _has_features(required.operator, required.backend, required.features):
        raise NotImplementedError(refusal(operator, arguments))


def _has_features(operator: str, backend: str, features: tuple[str, ...]) -> bool:
    rows = [row for row in table() if (row.operator, row.backend) == (operator, backend)]
    return all(set(features) <= set(row.features) for row in rows)


# What torch.compiler.assume_constant_result does, without importing dynamo.
_has_features._dynamo_marked_constant = True  # type: ignore[attr-defined]


def expect(ok: bool, name: str, expected: object, got: object) -> None:
    """Refuses an argument unless it is ok, in the words in which the operators of C++ do."""
    if not ok:
        raise RuntimeError(f"{name}: expected {expected}, got {got}")


def check_placement(arguments: dict[str, Any]) -> None:
    """Checks that all tensors are strided and on one device, that of query, or of the first tensor without query."""
    tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    first = "query" if "query" in tensors else next(iter(tensors))
    device = tensors[first].device
    for name, x in tensors.items():
        if x.layout != torch.strided:
            raise RuntimeError(f"{name}: expected a strided tensor, got layout {x.layout}")
        if x.device != device:
            raise RuntimeError(f"{name}: expected a tensor on {device} like {first}, got one on {x.device}")


def markdown() -> str:
    """The table as docs/attention/index.md shows it."""
    lines = ["| operator | backend | dtypes | head_dim | features | backward |", "|---|---|---|---|---|---|"]
    for row in table():
        low, high = row.head_dim
        cells = (
            f"`{row.operator}`",
            row.backend,
            ", ".join(row.dtypes),
            f"{low}-{high}",
            ", ".join(feature.replace("_", " ") for feature in row.features),
            "yes" if row.backward else "no",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
