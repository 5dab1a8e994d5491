"""The installed package, seen from a folder without its sources: metadata, extension, one step of training.

Takes the name of the folder that holds the package.
"""

import importlib.metadata
import sys
from pathlib import Path

import torch

import flash_attn
from flash_attn.flash_attention import FlashMHA

version = importlib.metadata.version("flash-attn")
assert flash_attn.__version__ == version, (flash_attn.__version__, version)
needed = [each for each in importlib.metadata.requires("flash-attn") or [] if each.startswith("torch")]
assert needed == [f"torch=={'.'.join(torch.__version__.split('.')[:2])}.*"], needed
owners = importlib.metadata.packages_distributions()
for module in ("flash_attn", "flash_attn_2_cuda"):
    assert owners.get(module) == ["flash-attn"], (module, owners.get(module))
assert Path(flash_attn.__file__).parent.parent.name == sys.argv[1], flash_attn.__file__

print(f"flash-attn {version}: {flash_attn.build_info()}")
layer = FlashMHA(embed_dim=64, num_heads=4, causal=True)
out, _ = layer(torch.randn(2, 10, 64))
out.sum().backward()
assert out.shape == (2, 10, 64)
assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
print("one step of training: gradients of every parameter are there")
