"""flash_attn.integrations.transformers: what register and write_local_kernel accept and do, in fresh processes."""

import os
import re
import subprocess
import sys

import pytest
import torch

from flash_attn.integrations.transformers import attention_forward, register, write_local_kernel

MODEL = """
import torch, transformers
config = transformers.LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                  num_attention_heads=2, initializer_range=0.2)
ids = torch.arange(1, 9)[None]

def logits(attention):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention)(ids).logits

expected = logits("eager")
"""
REFUSED = """
try:
    logits("flash_attention_2")
except (ImportError, ValueError) as error:
    assert "CPU" in str(error) or "not available" in str(error), error
else:
    raise AssertionError("transformers accepts flash_attention_2 on a CPU: register does nothing any more")
"""
AGREE = """
for attention in ("flash_attention_2", "fa2"):
    torch.testing.assert_close(logits(attention), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
"""
# transformers asks for a newer `kernels` than there is.
LOCAL_KERNEL = """
import os, sys
from transformers.utils import import_utils
import_utils.is_kernels_available = lambda *versions: True
import transformers.utils
transformers.utils.is_kernels_available = import_utils.is_kernels_available
from flash_attn.integrations.transformers import write_local_kernel
os.environ["LOCAL_KERNELS"] = write_local_kernel(sys.argv[1])
"""
SAME_FUNCTIONS = """
import flash_attn
from transformers import modeling_flash_attention_utils as utils
torch.testing.assert_close(logits("flash_attention_2"), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
assert utils._flash_varlen_fn is flash_attn.flash_attn_varlen_func
"""


def run(program, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_register_is_what_makes_it_work():
    """Refused before, right afterwards, and transformers does not warn of float32 or of a missing GPU."""
    line = "\nfrom flash_attn.integrations.transformers import register\nregister()\nregister()\n"
    output = run(MODEL + REFUSED + line + AGREE)
    assert "Flash Attention" not in output and "Casting" not in output, output


def test_local_kernel(tmp_path):
    """Nothing is patched: transformers asks `kernels`, which finds our functions in the folder."""
    pytest.importorskip("kernels")
    run(LOCAL_KERNEL + MODEL + SAME_FUNCTIONS, str(tmp_path / "new" / "folder"))


def test_local_kernel_writes_again(tmp_path):
    first = write_local_kernel(tmp_path)
    assert write_local_kernel(str(tmp_path)) == first == f"kernels-community/flash-attn2={tmp_path}"
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert written == ["build/torch-cpu/__init__.py", "build/torch-cpu/metadata.json"]


def heads(batch_size=2, seqlen=5):
    return torch.zeros(batch_size, 3, seqlen, 8)


def call(mask):
    return attention_forward(torch.nn.Module(), heads(), heads(), heads(), mask, is_causal=False)


def causal_call(mask):
    return attention_forward(torch.nn.Module(), heads(), heads(), heads(), mask)


def biased_call():
    return attention_forward(torch.nn.Module(), heads(), heads(), heads(), None, position_bias=torch.zeros(1))


# (function, arguments, exception, what its message says)
BAD_CALLS = [
    (register, (3,), TypeError, "name: expected str, got int"),
    (register, ("my_flash",), ValueError, """name: expected one without "flash", "|" and "/", got 'my_flash'"""),
    (register, ("",), ValueError, "got ''"),
    (register, ("sdpa",), ValueError, "name: expected one that no other implementation has, got 'sdpa'"),
    (register, ("eager",), ValueError, "got 'eager'"),
    (write_local_kernel, ("a:b",), ValueError, 'directory: expected a path without ":" and "="'),
    (call, (torch.ones(2, 1, 5, 5),), ValueError, "(batch_size, seqlen) = (2, 0 to 5), got (2, 1, 5, 5)"),
    (call, (torch.ones(2, 6),), ValueError, "attention_mask: expected (batch_size, seqlen) = (2, 0 to 5), got (2, 6)"),
    (causal_call, (torch.ones(2, 4),), ValueError, "(batch_size, seqlen) = (2, 5 to 5), got (2, 4)"),
    (biased_call, (), ValueError, "position_bias: expected None"),
]


@pytest.mark.parametrize(("function", "arguments", "exception", "message"), BAD_CALLS)
def test_bad_calls(function, arguments, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        function(*arguments)
