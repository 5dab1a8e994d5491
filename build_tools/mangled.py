"""What the mangled names of kernels say of their template arguments (Itanium C++ ABI)."""

from __future__ import annotations

import re

# A struct among the arguments: tl <type> <values> E.
SHAPE = re.compile(r"I(?:NS_\d+(?P<element>[a-z]+\d+)E)?XtlNS_\d+(?P<shape>[A-Za-z]\w*?)E(?P<values>(?:L[a-z]\d+E)*)E")


def config_of(mangled: str) -> tuple[str, str, tuple[int, ...]]:
    """The element type and the tile shape that a mangled name has among its arguments.

    Compilers differ in whether they write zeros at the end of a struct.
    """
    match = SHAPE.search(mangled)
    if match is None:
        return "", mangled, ()
    values = [int(value) for value in re.findall(r"L[a-z](\d+)E", match["values"])]
    while values and values[-1] == 0:
        values.pop()
    return match["element"], match["shape"], tuple(values)


def variant_of(mangled: str) -> str:
    """The mask and the score: "FullMask PlainScore"."""
    return " ".join(re.findall(r"NS_\d+([A-Z][A-Za-z]*(?:Mask|Score))(?:E|If)", mangled))
