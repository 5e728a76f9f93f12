"""Forward and backward of attention whose keys travel around a ring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnx._operators.schema import Arguments, signature, sum_dtype
from attnx.distributed import _group
from attnx.distributed._group import Group
from attnx.distributed._parts import Band, Part
from attnx.merging import merge_attention


@dataclass(frozen=True)
class Plan:
    """What a process does, step by step.

    Attributes:
        operator: the operator that it calls.
        group: the processes of the ring.
        constants: the operator's arguments that are the same in every call.
        steps: the calls of each step. In the one of number n it has the keys from n processes before.
        band: which keys a query sees.
        row_bias: (length_q,), what is added to the logits of a row; or None.
        parameters: the names of the tensors that have numbers for each head, in the order of the inputs.
        of_keys: the names of those that travel, in the order of the inputs, after them.
    """

    operator: str
    group: Group
    constants: Arguments
    steps: list[list[Part]]
    band: Band
    row_bias: Tensor | None
    parameters: tuple[str, ...]
    of_keys: tuple[str, ...]

    def call(self, part: Part, query: Tensor, given: Arguments, held: dict[str, Tensor]) -> Arguments:
        """The operator's arguments for one part."""
        left, right = (self.band.left, self.band.right) if part.is_cut else (-1, -1)
        arguments = self.constants | given | {name: x[:, :, part.keys] for name, x in held.items()}
        arguments |= {"query": query[:, :, part.queries], "position_offset": part.position_offset}
        arguments |= {"window_left": left, "window_right": right}
        if self.row_bias is not None:
            keys = arguments["key"].shape[2]
            arguments["attn_mask"] = self.row_bias[None, None, part.queries, None].expand(-1, -1, -1, keys)
        return arguments

    @torch.no_grad()
    def check(self, position_offset: int, query: Tensor, *inputs: Tensor | None) -> None:
        """Has the operator refuse what it does not take, before anything is sent: a call without rows does that."""
        nothing = Part(slice(0), slice(0), is_cut=True, position_offset=position_offset)
        parameters, held = self.by_name(inputs)
        parameters.pop("sink", None)
        signature(self.operator).call(self.call(nothing, query, parameters, held))

    def by_name(self, inputs: tuple[Tensor | None, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns the parameters and what travels, those that are there."""
        named = zip((*self.parameters, *self.of_keys), inputs, strict=True)
        there = {name: x for name, x in named if x is not None}
        parameters = {name: there[name] for name in self.parameters if name in there}
        return parameters, {name: there[name] for name in self.of_keys if name in there}


class RingAttention(torch.autograd.Function):
    """The inputs after the query are those that the plan names, in order. The results are output and logsumexp."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, query: Tensor, *inputs: Tensor | None) -> tuple[Tensor, Tensor | None]:
        parameters, held = plan.by_name(inputs)
        of = signature(plan.operator)
        # A sink is a part without a value, from which the total begins.
        sink = parameters.pop("sink", None)
        total = _Total(query, held["value"], sink, "logsumexp" in of.results)
        for step, keys in _group.pass_around(held, plan.group, len(plan.steps)):
            for part in plan.steps[step]:
                total.add(part.queries, of.call(plan.call(part, query, parameters, keys)))
        output = total.output.to(query.dtype)
        ctx.plan = plan
        ctx.save_for_backward(query, *inputs, output, total.logsumexp)
        return output, total.logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, grad_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        query, *inputs, output, logsumexp = ctx.saved_tensors
        parameters, held = plan.by_name(tuple(inputs))
        sink = parameters.pop("sink", None)
        names = (*plan.parameters, *plan.of_keys)
        wanted = dict(zip(names, ctx.needs_input_grad[2:], strict=True))
        rows = {"grad_output": grad_output, "output": output}
        if logsumexp is not None and grad_logsumexp is not None:
            rows |= {"grad_logsumexp": grad_logsumexp, "logsumexp": logsumexp}
        of = signature(f"{plan.operator}_backward")
        options = {f"{name}_gradient": wanted[name] for name in ("key_bias", "key_mask")}
        options |= {"attn_mask_gradient": False, "distance_bias_gradient": False}
        options |= {"deterministic": torch.are_deterministic_algorithms_enabled()}

        grad_query = _zeros(query)
        of_parameters = {name: _zeros(x) for name, x in parameters.items()}

        def differentiate(step: int, held: dict[str, Tensor]) -> dict[str, Tensor]:
            of_keys = {name: _zeros(x) for name, x in held.items() if wanted[name] or name in ("key", "value")}
            for part in plan.steps[step]:
                arguments = plan.call(part, query, parameters, held) | options
                arguments |= {name: x[:, :, part.queries].contiguous() for name, x in rows.items()}
                gradients = dict(zip(of.results, of.call(arguments), strict=True))
                grad_query[:, :, part.queries] += gradients["grad_query"]
                for name, x in of_keys.items():
                    x[:, :, part.keys] += gradients[f"grad_{name}"]
                for name, x in of_parameters.items():
                    x += gradients[f"grad_{name}"].sum_to_size(x.shape)
            return of_keys

        gradients = of_parameters | _group.pass_back(held, plan.group, len(plan.steps), differentiate)
        if sink is not None:
            gradients["sink"] = _sink_gradient(sink, **rows)
        of_inputs = (
            gradients[name].to(x.dtype) if x is not None and wanted[name] else None
            for name, x in zip(names, inputs, strict=True)
        )
        return None, grad_query.to(query.dtype), *of_inputs


class _Total:
    """What the parts so far make together, in the dtype of sums."""

    def __init__(self, query: Tensor, value: Tensor, sink: Tensor | None, is_normalised: bool) -> None:
        rows = query.shape[:3]
        self.output = query.new_zeros((*rows, value.shape[3]), dtype=sum_dtype(query))
        self.logsumexp: Tensor | None = None
        if is_normalised:
            self.logsumexp = query.new_full(rows, -torch.inf, dtype=sum_dtype(query))
            if sink is not None:
                self.logsumexp.copy_(sink[..., None])

    def add(self, rows: slice, results: Any) -> None:
        if self.logsumexp is None:
            self.output[:, :, rows] += results
            return
        output, logsumexp = results
        outputs = [self.output[:, :, rows], output.to(self.output.dtype)]
        merged = merge_attention(outputs, [self.logsumexp[:, :, rows], logsumexp])
        self.output[:, :, rows], self.logsumexp[:, :, rows] = merged


def _zeros(x: Tensor) -> Tensor:
    """The sum of gradients of x begins here."""
    return torch.zeros(x.shape, dtype=sum_dtype(x), device=x.device)


def _sink_gradient(
    sink: Tensor, *, grad_output: Tensor, output: Tensor, grad_logsumexp: Tensor, logsumexp: Tensor
) -> Tensor:
    """A sink takes the weight e^(sink - L) of a row from its output, and adds it to its logsumexp L."""
    weight = (sink[..., None] - logsumexp).exp().where(logsumexp != -torch.inf, 0.0)
    dtype = weight.dtype
    change = grad_logsumexp - (grad_output.to(dtype) * output.to(dtype)).sum(-1)
    return (weight * change).sum((0, 2)).sum_to_size(sink.shape)
