"""Layers only look left.

In csrc: ptx -> tile -> attn -> kernels -> launch -> ops, with params.h and host_device.h left of all. The CPU backend
stands beside the kernels and sees only those two and the policies in attn/, which know no hardware.
"""

import ast
import re

from .source import Findings, Source

POLICY_NAMES = ("divisor", "dropout", "mask", "paged_kv", "scalars", "scheduler", "score", "seqlen")
POLICIES = tuple(f"attn/{name}.h" for name in POLICY_NAMES)
GPU_LAYERS = ("ptx", "tile", "attn", "kernels", "launch")
EVERYWHERE = {"params"}
MAY_INCLUDE: dict[str, set[str]] = {
    "params": EVERYWHERE,
    "policy": EVERYWHERE | {"policy"},
    "entry": EVERYWHERE,  # kernels.h and cpu/backend.h: all that ops/ sees of the kernels and of the CPU backend
    "cpu": EVERYWHERE | {"policy", "entry", "cpu"},
    "ops": EVERYWHERE | {"policy", "entry", "ops"},
}
MAY_INCLUDE |= {
    layer: EVERYWHERE | set(GPU_LAYERS[: i + 1]) | ({"policy"} if i >= GPU_LAYERS.index("attn") else set())
    for i, layer in enumerate(GPU_LAYERS)
}
MAY_INCLUDE["launch"] |= {"entry"}


def layer_of(path: str) -> str | None:
    """The layer of a path from the root of csrc, None if there is no such layer."""
    if path in ("params.h", "host_device.h"):
        return "params"
    if path in ("kernels.h", "cpu/backend.h"):
        return "entry"
    if path in POLICIES:
        return "policy"
    folder = path.partition("/")[0]
    return folder if "/" in path and folder in MAY_INCLUDE else None


def includes_to_the_right(source: Source) -> Findings:
    layer = layer_of(source.path.removeprefix("csrc/"))
    if layer is None:
        yield 1, "a folder that the table of layers does not know"
        return
    for number, included in quoted_includes(source):
        target = layer_of(included)
        if target is not None and target not in MAY_INCLUDE[layer]:
            yield number, f'{layer} includes "{included}"'


def includes_not_from_the_root(source: Source) -> Findings:
    for number, included in quoted_includes(source):
        if layer_of(included) is None:
            yield number, f'"{included}"'


def quoted_includes(source: Source) -> Findings:
    for number, line in enumerate(source.cpp_code, 1):
        if match := re.match(r'\s*#\s*include\s*"([^"]+)"', line):
            yield number, match[1]


PYTHON_LAYERS = (
    "_version",
    "_library",
    "_flops",
    "_checks",
    "_constants",
    "_autograd_names",
    "utils",
    "autograd",
    "_kernel_interface",
    "flash_attn_interface",
    "bert_padding",
    "layers",
    "ops",
    "flash_attention",
    "modules",
    "__init__",
)


def python_imports_to_the_right(source: Source) -> Findings:
    own = source.path.removeprefix("flash_attn/").removesuffix(".py").split("/")
    own_layer = own[0]
    if own_layer not in PYTHON_LAYERS:
        yield 1, f"{own_layer} is not in the table of layers"
        return
    for node in ast.walk(source.tree):
        for module in imported_modules(node, package=["flash_attn", *own[:-1]]):
            layer = module.split(".")[1] if module.startswith("flash_attn.") else None
            if layer in PYTHON_LAYERS and PYTHON_LAYERS.index(layer) > PYTHON_LAYERS.index(own_layer):
                yield node.lineno, f"{own_layer} imports {module}"


def imported_modules(node: ast.AST, package: list[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else []
        module = ".".join([*base, *([node.module] if node.module else [])])
        return [f"{module}.{alias.name}" for alias in node.names] if module == "flash_attn" else [module]
    return []
