"""How the reports call a CUDA kernel, from the demangled name that disassemblers, emulators and profilers show."""

from __future__ import annotations

import re

_NAME = re.compile(r"attnx_(\w+?)(?:_sm80|_(sm90))?(?:<(.*)>)?\(")
_TILE = re.compile(r"[\w:]+Tile<(\d+), (\d+), (\d+)[^>]*>")
_WORDS = {
    "(attnx::Score)0": "sigmoid",
    "(attnx::Score)1": "softmax",
    "__nv_bfloat16": "bfloat16",
    "__half": "float16",
}
# What false and true say, for each of a kernel's flags in turn.
_ALIGNED, _LISTED, _SOFTMAX = ("unaligned", ""), ("", "listed"), ("sigmoid", "softmax")
_FLAGS = {
    "forward": (_LISTED, _ALIGNED),
    "backward": (_LISTED, _ALIGNED),
    "grad_query": (_ALIGNED,),
    "row_terms": (_ALIGNED,),
    "combine": (_SOFTMAX,),
}


def label(demangled: str) -> str:
    """A kernel in words: "forward softmax bfloat16 32 128x64 listed" has 32 features and tiles of 128 rows, 64 keys.

    It is one for sm_80, or has sm90 after its name.
    """
    match = _NAME.search(demangled)
    if match is None:
        raise ValueError(f"expected the name of a kernel of attnx, got {demangled}")
    kernel, arguments = match[1], _TILE.sub(r"\1 \2x\3", match[3] or "")
    flags = iter(_FLAGS.get(kernel, ()))
    words, flag_words = [kernel, match[2] or ""], []
    for argument in filter(None, re.split(r",\s*", arguments.strip())):
        if argument in ("false", "true"):
            flag_words.append(next(flags)[argument == "true"])
        else:
            words.append(_WORDS.get(argument, argument.rpartition("::")[2]))
    return " ".join(filter(None, words + flag_words))


def mainloop(name: str) -> str:
    """The one that the kernel of this label belongs to."""
    return "sm90" if " sm90 " in name else "sm80"


def is_float16(name: str) -> bool:
    return " float16" in name


def in_bfloat16(name: str) -> str:
    """The same kernel on bfloat16 inputs."""
    return name.replace(" float16", " bfloat16")


def order(name: str) -> list[tuple[bool, int, str]]:
    """A key to sort labels by: the numbers in them as numbers."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]
