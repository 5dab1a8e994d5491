"""Rotary angles of far positions: float64 tables must have float64 accuracy.

Tables for float64 inputs were computed in float32: at position 10,000 the cosine was off by 2.4e-4.

Public threads: EleutherAI/gpt-neox#1003, kekzl/imp#1325
"""

import math

import pytest
import torch

from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.modules.mha import MHA
from plain_attention import assert_near
from rotation import frequencies, rotated

POSITIONS = [0, 1, 10_000, 99_999]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-2)], ids=str)
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_tables(base, dtype, tolerance):
    """float32 tables equal those of 2.8.3: their angles are float32 products."""
    (cos, sin), (cos_k, sin_k) = RotaryEmbedding(64, base=base).tables(100_000, torch.zeros(1, dtype=dtype))
    for position in POSITIONS:
        for pair in (0, 1, 31):
            angle = position * base ** (-2 * pair / 64)
            expected = torch.tensor([math.cos(angle), math.sin(angle)] * 2, dtype=torch.float64)
            found = torch.stack([t[position, pair] for t in (cos, sin, cos_k, sin_k)])
            assert_near([found], [expected], atol=tolerance)


def test_xpos_tables():
    seqlen, dim, scale_base = 10_001, 8, 512.0
    rotary = RotaryEmbedding(dim, scale_base=scale_base)
    (cos, _), (cos_k, _) = rotary.tables(seqlen, torch.zeros(1, dtype=torch.float64))
    for position in (0, 5_000, 10_000):
        for pair in range(dim // 2):
            growth = ((2 * pair + 0.4 * dim) / (1.4 * dim)) ** ((position - seqlen // 2) / scale_base)
            turned = math.cos(position * 10000.0 ** (-2 * pair / dim))
            assert cos[position, pair].item() == pytest.approx(turned * growth, rel=1e-9, abs=1e-12)
            assert cos_k[position, pair].item() == pytest.approx(turned / growth, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("offset", [9_000, torch.tensor([9_000, 50])], ids=["int", "tensor"])
def test_embedding_in_float64(offset):
    qkv = torch.randn(2, 5, 3, 2, 8, dtype=torch.float64)
    out = RotaryEmbedding(8)(qkv.clone(), seqlen_offset=offset)
    positions = torch.as_tensor(offset).reshape(-1, 1) + torch.arange(5)
    angle = positions.expand(2, 5)[..., None] * frequencies(8)
    assert_near([out[:, :, i] for i in (0, 1)], [rotated(qkv[:, :, i], angle) for i in (0, 1)], atol=1e-11)
    assert torch.equal(out[:, :, 2], qkv[:, :, 2])


def test_module_in_float64_after_one_in_float32():
    """Tables of one dtype are not reused for another."""
    module = MHA(16, 2, rotary_emb_dim=8, causal=True, dtype=torch.float64, use_flash_attn=True)
    x = torch.randn(1, 3000, 16, dtype=torch.float64)
    expected = module(x)
    module.float()(x.float())
    module.double()
    module.load_state_dict({name: p.double() for name, p in module.state_dict().items()})
    wide = module(x)
    assert_near([wide], [expected], atol=1e-5)
    assert torch.equal(module.rotary_emb.tables(10, x)[0][0], RotaryEmbedding(8).tables(3000, x)[0][0])


def test_assigned_frequencies_in_float64():
    rotary = RotaryEmbedding(4)
    rotary.inv_freq = torch.tensor([0.3, 1 / 7], dtype=torch.float64)
    (cos, _), _ = rotary.tables(10_001, torch.zeros(1, dtype=torch.float64))
    assert_near([cos[10_000]], [torch.tensor([math.cos(3000.0), math.cos(10_000 / 7)])], atol=1e-6)
    assert cos[10_000, 0].item() == pytest.approx(math.cos(3000.0), abs=1e-11)
