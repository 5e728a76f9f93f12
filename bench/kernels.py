"""Reports call a CUDA kernel by a label, made from the name that disassemblers, emulators and profilers show."""

from __future__ import annotations

import re
from collections.abc import Iterator

_NAME = re.compile(r"attnx_(\w+?)(?:_(sm\d+))?(?:<(.*)>)?\(")
_TILE = re.compile(r"\w+Tile<(\d+), (\d+), (\d+)")
_DTYPES = {"__nv_bfloat16": "bfloat16", "__half": "float16"}
# These are the words of policies that are not their names: a band of strided or TMA's rows, with plain logits, is the
# ordinary case.
_POLICIES = {
    **dict.fromkeys(
        ("Banded", "Strided", "Tma", "Gathered", "GatheredAsync", "Plain", "NoTangents", "StridedEither"), ""
    ),
    "Listed": "listed",
    "Clustered": "clustered",
    "Unpacked": "staircase",
    "WithTerms": "terms",
    "WithTables": "tables",
    "GivenTangents": "tangents",
}
# These are the words of false and true where they are a kernel's own arguments, or a policy's.
_FLAGS = {
    "row_terms": ("unaligned", ""),
    "combine": ("pointwise", "normalised"),
    "Strided": ("unaligned", ""),
    "Gathered": ("unaligned", ""),
    "sample_blocks": ("", "transposed"),
    "label_blocks": ("unshared", ""),
    "pool_blocks": ("unaligned", ""),
    "range_means": ("unaligned", ""),
    **dict.fromkeys(
        (f"linear_state_{kernel}" for kernel in ("sums", "outputs", "grad_query", "grad_keys", "finish")),
        ("mapped", "taylor"),
    ),
}
# These kernels serve forward and backward, whose arguments tell them apart.
_OF_BOTH = ("linear_state_sums", "linear_state_outputs", "delta_rule_outputs")


def _split(arguments: str) -> Iterator[str]:
    """The template arguments of a name, without those that are arguments of another one."""
    depth, start = 0, 0
    for i, character in enumerate(arguments + ","):
        depth += (character == "<") - (character == ">")
        if character == "," and depth == 0:
            yield arguments[start:i].strip()
            start = i + 1


def _words(owner: str, argument: str) -> Iterator[str]:
    """The words of one template argument of a kernel or policy."""
    name, _, inner = argument.removesuffix(">").partition("<")
    name = name.rpartition("::")[2]
    if name.endswith(("Arguments", "Place")):  # they follow from the rest, or say where its rows are
        if re.fullmatch("Cluster.*Arguments", name):
            yield _POLICIES["Clustered"]
        elif re.fullmatch("Staircase.*Arguments", name):
            yield _POLICIES["Unpacked"]
        elif name in ("StateRowArguments", "StateGradArguments", "DeltaGradArguments") and owner in _OF_BOTH:
            yield "backward"
        return
    if tile := _TILE.search(argument):
        yield from (tile[1], f"{tile[2]}x{tile[3]}")
    elif argument in ("false", "true"):
        yield _FLAGS[owner][argument == "true"]
    elif name in _DTYPES:
        yield _DTYPES[name]
    elif name in _POLICIES:
        yield _POLICIES[name]
        yield from (word for part in _split(inner) for word in _words(name, part))
    else:
        yield re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()  # a score: SoftmaxSink


_LAST = ("listed", "clustered", "staircase", "unaligned", "terms", "tangents")


def is_ours(demangled: str) -> bool:
    """Whether a kernel is attnx's own, not one that CUB brings."""
    return _NAME.search(demangled) is not None


def label(demangled: str) -> str:
    """A kernel in words: "forward softmax bfloat16 32 128x64 listed" has 32 features and tiles of 128 rows, 64 keys.

    A kernel for sm_90a has sm90 after its name; one for sm_80 has nothing there.
    """
    match = _NAME.search(demangled)
    if match is None:
        raise ValueError(f"expected the name of a kernel of attnx, got {demangled}")
    kernel, mainloop, arguments = match[1], match[2] or "", match[3]
    words = [word for part in _split(arguments or "") for word in _words(kernel, part)]
    ordered = sorted(filter(None, words), key=lambda word: (word in _LAST, word[0].isdigit()))
    return " ".join(filter(None, [kernel, mainloop if mainloop != "sm80" else "", *ordered]))


def mainloop(name: str) -> str:
    """The mainloop that the kernel of this label belongs to."""
    return "sm90" if " sm90 " in name else "sm80"


def is_float16(name: str) -> bool:
    return " float16" in name


def in_bfloat16(name: str) -> str:
    """The same kernel on bfloat16 inputs."""
    return name.replace(" float16", " bfloat16")


def order(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts labels with the numbers in them as numbers."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
