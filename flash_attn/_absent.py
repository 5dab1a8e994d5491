"""Modules of flash_attn 2.8.3 that this package does not have: importing one says what to use instead."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_OWN_MODEL = "flash_attn.modules.mha.MHA and layers of torch.nn"
_ATTENTION = "flash_attn.flash_attn_func"

# The module, and what to use instead. Their submodules are not reached.
INSTEAD = {
    "flash_attn.flash_attn_triton": f"{_ATTENTION}, or torch.nn.attention.flex_attention for a bias of the scores",
    "flash_attn.flash_attn_triton_amd": _ATTENTION,
    "flash_attn.flash_attn_triton_og": _ATTENTION,
    "flash_attn.flash_blocksparse_attention": f"{_ATTENTION} with window_size or key_ranges",
    "flash_attn.flash_blocksparse_attn_interface": f"{_ATTENTION} with window_size or key_ranges",
    "flash_attn.fused_softmax": "torch.nn.functional.softmax",
    "flash_attn.layers.patch_embed": "torch.nn.Conv2d",
    "flash_attn.losses.cross_entropy_apex": "flash_attn.losses.cross_entropy.CrossEntropyLoss",
    "flash_attn.losses.cross_entropy_parallel": "flash_attn.losses.cross_entropy.CrossEntropyLoss",
    "flash_attn.models": _OWN_MODEL,
    "flash_attn.modules.block": _OWN_MODEL,
    "flash_attn.modules.embedding": "torch.nn.Embedding",
    "flash_attn.modules.mlp": "torch.nn.Linear and torch.nn.functional.gelu or silu",
    "flash_attn.ops.activations": "torch.nn.functional.gelu, relu or silu",
    "flash_attn.ops.fused_dense": "torch.nn.Linear",
    "flash_attn.ops.triton.k_activations": "torch.nn.functional.gelu, relu or silu",
    "flash_attn.ops.triton.linear": "torch.nn.Linear",
    "flash_attn.ops.triton.mlp": "torch.nn.Linear and torch.nn.functional.gelu or silu",
    "flash_attn.utils.benchmark": "torch.utils.benchmark",
    "flash_attn.utils.pretrained": "torch.load, or huggingface_hub",
    "flash_attn.utils.testing": "torch.nn.functional.scaled_dot_product_attention, in float64, as a reference",
}


class AbsentModules:
    """A finder that finds nothing: it explains why an import of a module in the table fails.

    It is asked last, so a module that another distribution provides is found before. importlib.util.find_spec gets
    None, as for any module that is not there.
    """

    @staticmethod
    def find_spec(fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """None, or the error of an import statement.

        Raises:
            ModuleNotFoundError: an import statement asks for a module in the table.
        """
        if fullname in INSTEAD and _is_import():
            explanation = f"{fullname} of flash_attn 2.8.3 is not part of this package. Instead: {INSTEAD[fullname]}"
            raise ModuleNotFoundError(explanation, name=fullname)
        return None


def _is_import() -> bool:
    """Whether the finder is called by an import, and not by a question such as importlib.util.find_spec.

    Both call it through one function of importlib. What calls that has a name of its own in CPython; elsewhere the
    answer is False, and the import fails with the interpreter's own message.
    """
    caller = sys._getframe(2).f_back
    return caller is not None and caller.f_code.co_name == "_find_and_load_unlocked"


def explain_absent_modules() -> None:
    """Add the finder behind all others, once."""
    if AbsentModules not in sys.meta_path:
        sys.meta_path.append(AbsentModules)
