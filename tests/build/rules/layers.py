"""Include layering: every part of csrc includes only itself and the parts that the table lists for it."""

import ast
import re

from .source import Findings, Source

# Parts of csrc by path prefix; a file belongs to the longest matching prefix.
POLICY = ("policy/host_device.h", "policy/divisor.h", "problem.h", "policy/")
TILES = ("policy/host_device.h", "cuda/ptx/", "cuda/tile/")
BACKEND = ("problem.h", "cuda/device.h", "cuda/api.h", "cuda/backend.h")
SHARED = ("cuda/instance.h", "cuda/instances.h", "cuda/shape_table.h", "cuda/launch.h", "cuda/attention/")
ARCHITECTURE = (*POLICY, *TILES, *BACKEND, *SHARED)
MAY_INCLUDE: dict[str, tuple[str, ...]] = {
    "policy/host_device.h": (),
    "policy/divisor.h": ("policy/host_device.h",),
    "problem.h": ("policy/divisor.h",),
    "policy/": POLICY,
    "cuda/device.h": (),
    "cuda/api.h": ("problem.h", "cuda/device.h"),  # the only header of the kernels that ops/ includes
    "cuda/backend.h": BACKEND,
    "cuda/backends.cpp": (*POLICY, *BACKEND),
    "cuda/instance.h": ("problem.h", "cuda/device.h"),
    "cuda/instances.h": (*BACKEND, "cuda/instance.h", "policy/host_device.h"),
    "cuda/shape_table.h": (),
    "cuda/launch.h": ("cuda/device.h",),
    "cuda/ptx/": ("policy/host_device.h",),
    "cuda/tile/": TILES,
    "cuda/attention/": ARCHITECTURE,
    "cpu/backend.h": ("problem.h",),  # the only header of the CPU backend that ops/ includes
    "cpu/": (*POLICY, "cpu/backend.h"),
    "ops/": (*POLICY, "cuda/api.h", "cpu/backend.h"),
}


def layer_of(path: str) -> str | None:
    """The part that contains a path relative to csrc; None if the table has none."""
    if folder := re.match(r"cuda/sm\d+/", path):
        return folder[0]
    return max((part for part in MAY_INCLUDE if path.startswith(part)), key=len, default=None)


def may_include(layer: str) -> tuple[str, ...]:
    """The parts that a part may include besides itself. Architecture folders must not include each other."""
    return MAY_INCLUDE.get(layer, ARCHITECTURE)


def includes_to_the_right(source: Source) -> Findings:
    layer = layer_of(source.path.removeprefix("csrc/"))
    if layer is None:
        yield 1, "a folder that the table of layers does not know"
        return
    for number, included in quoted_includes(source):
        target = layer_of(included)
        if target is not None and target not in (layer, *may_include(layer)):
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
    "_absent",
    "_library",
    "_flops",
    "_checks",
    "_constants",
    "merge",
    "_autograd_names",
    "utils",
    "_sharding",
    "autograd",
    "kv_cache",
    "_explain",
    "_kernel_interface",
    "packed_functions",
    "v1_functions",
    "flash_attn_interface",
    "bert_padding",
    "context_parallel",
    "layers",
    "ops",
    "losses",
    "flash_attention",
    "modules",
    "integrations",
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
