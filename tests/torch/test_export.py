"""torch.export and AOTInductor: modules with a padding mask, any batch size and length, in processes of their own."""

import subprocess
import sys

import pytest
import torch

import flash_attn
from compare import assert_bitwise
from flash_attn.flash_attention import FlashMHA
from flash_attn.modules.mha import MHA
from paths import environment

EMBED, HEADS = 32, 4
BATCH, SEQLEN, SEQLEN_K = torch.export.Dim("batch"), torch.export.Dim("seqlen"), torch.export.Dim("seqlen_k")

MODULES = {
    "FlashMHA": lambda: FlashMHA(EMBED, HEADS),
    "FlashMHA with everything": lambda: FlashMHA(EMBED, HEADS, causal=True, sinks=True),
    "MHA": lambda: MHA(EMBED, HEADS, use_flash_attn=True),
    "MHA with everything": lambda: MHA(
        EMBED, HEADS, num_heads_kv=2, causal=True, use_flash_attn=True, rotary_emb_dim=4, use_alibi=True,
        window_size=(3, 0), dwconv=True, sinks=True,
    ),
    "MHA in torch operations": lambda: MHA(EMBED, HEADS, num_heads_kv=2, causal=True, window_size=(3, 0)),
    "cross": lambda: MHA(EMBED, HEADS, cross_attn=True, causal=True, use_flash_attn=True),
}  # fmt: skip


class Masked(torch.nn.Module):
    """A module of the table, or several in a row, with one output."""

    def __init__(self, *names):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(MODULES[name]() for name in names)

    def forward(self, x, keep, x_kv=None):
        for layer in self.layers:
            more = {} if x_kv is None else {"x_kv": x_kv}
            out = layer(x, key_padding_mask=keep, **more)
            x = out[0] if isinstance(out, tuple) else out
        return x


def inputs_of(batch_size, seqlen, seqlen_k=None, share=0.6):
    """share: how much is not padding."""
    generator = torch.Generator().manual_seed(seqlen)
    x = torch.randn(batch_size, seqlen, EMBED, generator=generator)
    keep = torch.rand(batch_size, seqlen_k or seqlen, generator=generator) < share
    return (x, keep) if seqlen_k is None else (x, keep, torch.randn(batch_size, seqlen_k, EMBED, generator=generator))


@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in MODULES), ("FlashMHA", True), ("MHA", True), ("cross", True)]
)
def test_export_with_dynamic_shapes(name, strict):
    module, is_cross = Masked(name), name == "cross"
    shapes = ({0: BATCH, 1: SEQLEN}, {0: BATCH, 1: SEQLEN_K if is_cross else SEQLEN})
    shapes = (*shapes, {0: BATCH, 1: SEQLEN_K} if is_cross else None)[: 3 if is_cross else 2]
    sizes = [(3, 11), (2, 2), (5, 70)]
    if is_cross:
        sizes = [(batch_size, seqlen, seqlen + 6) for batch_size, seqlen in sizes]
    program = torch.export.export(module, inputs_of(*sizes[0]), dynamic_shapes=shapes, strict=strict)
    found = program.module()
    for size in sizes:
        for share in (0.6, 0.0, 1.0):
            inputs = inputs_of(*size, share=share)
            torch.testing.assert_close(found(*inputs), module(*inputs), rtol=1e-4, atol=1e-5)


class Packed(torch.nn.Module):
    def forward(self, q, kv, cu_seqlens, longest):
        longest = longest.item()
        return flash_attn.flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens, cu_seqlens, longest, longest, causal=True)


def packed_inputs(*lengths):
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return torch.randn(total, 4, 8), torch.randn(total, 2, 2, 8), cu_seqlens, torch.tensor(max(lengths))


def test_export_of_packed_sequences():
    """The number of sequences and their lengths are dynamic, and so is the longest, which is a number in a tensor."""
    total, count = torch.export.Dim("total"), torch.export.Dim("count")
    shapes = ({0: total}, {0: total}, {0: count}, None)
    program = torch.export.export(Packed(), packed_inputs(3, 4, 9), dynamic_shapes=shapes)
    for lengths in [(3, 4, 9), (70, 2), (5, 5, 0, 1, 30)]:
        inputs = packed_inputs(*lengths)
        assert_bitwise("out", program.module()(*inputs), Packed()(*inputs))


LOAD = """
import sys
import torch
{first}
model = torch._inductor.aoti_load_package(sys.argv[1])
for inputs, expected in torch.load(sys.argv[2]):
    torch.testing.assert_close(model(*inputs), expected, rtol=1e-4, atol=1e-5)
print("loaded")
"""


def load(package, calls, first):
    command = [sys.executable, "-c", LOAD.format(first=first), str(package), str(calls)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_package_of_aot_inductor(tmp_path):
    """It runs in another process, which must have imported flash_attn: the package calls its ops by name."""
    module = Masked("MHA", "FlashMHA").eval()
    with torch.no_grad():
        shapes = ({0: BATCH, 1: SEQLEN}, {0: BATCH, 1: SEQLEN})
        program = torch.export.export(module, inputs_of(3, 11), dynamic_shapes=shapes)
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        calls = [
            (inputs, module(*inputs)) for inputs in (inputs_of(3, 11), inputs_of(5, 23), inputs_of(2, 8, share=0.0))
        ]
    torch.save(calls, tmp_path / "calls.pt")
    done = load(package, tmp_path / "calls.pt", "import flash_attn")
    assert done.stdout == "loaded\n", done.stderr
    refused = load(package, tmp_path / "calls.pt", "")
    assert refused.returncode != 0
    assert "Could not find schema for flash_attn::_flash_attn_forward" in refused.stderr
