"""Dropout: the mask depends only on (seed, offset, batch, head, row, key), and the expectation is exact."""

import dataclasses

import numpy as np
import pytest
import torch

import flash_attn
import philox
from cases import Case
from check import op_fwd, op_probs
from compare import assert_bitwise
from device import on_device
from inputs import make_inputs
from reference import dropout_threshold

P = 0.3
BASE = Case((100, 100), (130, 130), num_heads=3, num_heads_k=3, head_dim=16, head_dim_v=16, dropout_p=P)


def keep_of(case: Case, state=(7, 0)) -> torch.Tensor:
    """Mask of the weights that the op keeps: (batch_size, num_heads, seqlen_q, seqlen_k)."""
    x = make_inputs(case)
    x.rng_state = torch.tensor(state)
    return ~torch.signbit(op_probs(case, x, op_fwd(case, x)[1]))


@on_device
@pytest.mark.parametrize("state", [(0, 0), (7, 0), (7, 1), (2**62 + 12345, 2**61 + 77), (-1, -5)])
@pytest.mark.parametrize("dropout_p", [0.001, 0.3, 0.9])
def test_mask_is_philox(state, dropout_p):
    """The mask matches philox.py, for any 64-bit seed and offset."""
    case = dataclasses.replace(BASE, dropout_p=dropout_p)
    seed, offset = (x % 2**64 for x in state)
    expected = philox.keep_mask(2, 3, 100, 130, seed, offset, dropout_threshold(dropout_p))
    assert np.array_equal(keep_of(case, state).cpu().numpy(), expected)


@on_device
@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_mask_is_the_same_for_every_type(dtype):
    assert torch.equal(keep_of(BASE), keep_of(dataclasses.replace(BASE, dtype=dtype)))


@on_device
@pytest.mark.parametrize(
    "changes",
    [
        {"packed": True},
        {"packed": True, "unused_rows": 5},
        {"head_dim": 64, "head_dim_v": 128},
        {"num_heads_k": 1},
        {"page_size": 16, "packed": True},
    ],
)
def test_mask_does_not_depend_on_layout(changes):
    assert torch.equal(keep_of(BASE), keep_of(dataclasses.replace(BASE, **changes)))


@on_device
@pytest.mark.parametrize("lengths", [(100, 300), (300, 130), (257, 259)])
def test_mask_of_a_longer_sequence_starts_with_that_of_a_shorter(lengths):
    longer = keep_of(dataclasses.replace(BASE, seqlens_q=(lengths[0],) * 2, seqlens_k=(lengths[1],) * 2))
    assert torch.equal(keep_of(BASE), longer[:, :, :100, :130])


@on_device
def test_mask_does_not_depend_on_the_other_sequences():
    uneven = dataclasses.replace(BASE, seqlens_q=(20, 100), seqlens_k=(0, 130), packed=True)
    assert torch.equal(keep_of(BASE)[1], keep_of(uneven)[1])
    assert torch.equal(keep_of(BASE)[:1], keep_of(dataclasses.replace(BASE, seqlens_q=(100,), seqlens_k=(130,))))


@on_device
@pytest.mark.parametrize(("q_start", "k_start"), [(0, 0), (32, 64), (64, 32), (96, 96)])
def test_mask_of_a_shard_is_a_part_of_the_whole(q_start, k_start):
    """Of rows and keys, and of heads: whichever device has them, a weight is kept or dropped alike."""
    whole = keep_of(dataclasses.replace(BASE, seqlens_q=(200,) * 2, seqlens_k=(300,) * 2, num_heads=8, num_heads_k=8))
    shard = dataclasses.replace(BASE, q_starts=(q_start,) * 2, k_starts=(k_start,) * 2, head_start=4, total_heads=8)
    assert torch.equal(keep_of(shard), whole[:, 4:7, q_start : q_start + 100, k_start : k_start + 130])


def test_masks_of_heads_batches_and_states_are_unrelated():
    """Two masks agree in about p^2 + (1 - p)^2 of the elements; so do a mask and a copy shifted by rows or keys."""
    case = dataclasses.replace(BASE, seqlens_q=(256, 256), seqlens_k=(256, 256))
    keep = keep_of(case)
    masks = [*keep.flatten(0, 1), keep_of(case, (8, 0))[0, 0], keep_of(case, (7, 1))[0, 0]]
    masks += [masks[0].roll(shift, dim) for shift in (1, 7, 8, 16, 32, 64, 128) for dim in (0, 1)] + [masks[0].T]
    expected, spread = P**2 + (1 - P) ** 2, 5 * 0.5 / 256
    for i in range(len(masks)):
        for j in range(i):
            agreement = (masks[i] == masks[j]).double().mean().item()
            assert abs(agreement - expected) < spread, (i, j, agreement)


@on_device
@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.83, 0.999])
def test_dropped_fraction(dropout_p):
    case = dataclasses.replace(BASE, seqlens_q=(512,) * 2, seqlens_k=(512,) * 2, dropout_p=dropout_p)
    dropped = (~keep_of(case)).double()
    deviation = (dropout_p * (1 - dropout_p)) ** 0.5
    assert abs(dropped.mean().item() - dropout_p) < 5 * deviation / dropped.numel() ** 0.5 + 2**-16
    for dims in [(0, 1, 2), (0, 1, 3)]:
        lines = dropped.mean(dims)
        assert (lines - dropout_p).abs().max() < 6 * deviation / (dropped.numel() / len(lines)) ** 0.5 + 2**-16


@pytest.mark.parametrize("dropout_p", [1e-9, 1e-5, 0.1, 0.3, 0.5, 0.9, 1 - 1e-9])
def test_expectation_is_exact(dropout_p):
    """Kept weights are scaled by 65536 / (65536 - threshold), where threshold / 65536 is close to dropout_p."""
    case = dataclasses.replace(BASE, dtype="float64", dropout_p=dropout_p)
    x = make_inputs(case)
    x.v = torch.ones_like(x.v)
    out, lse = op_fwd(case, x)
    probs = op_probs(case, x, lse)
    kept = torch.where(torch.signbit(probs), 0.0, probs).sum(-1).transpose(1, 2)
    threshold = dropout_threshold(dropout_p)
    assert abs(threshold / 65536 - dropout_p) <= 2**-16
    expected = kept * (65536 / (65536 - threshold))
    torch.testing.assert_close(out, expected[..., None].expand_as(out), rtol=1e-13, atol=1e-14)


def draw(dropout_p: float, **kwargs) -> torch.Tensor:
    x = make_inputs(BASE)
    return flash_attn.flash_attn_func(x.q, x.k, x.v, dropout_p, **kwargs)


def test_no_dropout_touches_no_generator():
    before = torch.get_rng_state()
    draw(0.0)
    assert torch.equal(before, torch.get_rng_state())
    draw(P)
    assert not torch.equal(before, torch.get_rng_state())


def test_backward_touches_no_generator():
    x = make_inputs(BASE)
    out = flash_attn.flash_attn_func(x.q.requires_grad_(), x.k, x.v, P)
    before = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.isfinite(x.q.grad).all()


def test_calls_differ_and_seeds_repeat():
    torch.manual_seed(3)
    first, second = draw(P), draw(P)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert_bitwise("out with the same seed", draw(P), first)
    torch.manual_seed(4)
    assert not torch.equal(draw(P), first)


def test_no_grad_draws_as_grad_does():
    x = make_inputs(BASE)
    torch.manual_seed(5)
    expected = flash_attn.flash_attn_func(x.q, x.k, x.v, P)
    torch.manual_seed(5)
    assert_bitwise("out", flash_attn.flash_attn_func(x.q.requires_grad_(), x.k, x.v, P).detach(), expected)


def test_s_dmask_shows_the_weights_and_what_was_dropped():
    """S_dmask of the public functions, dense and packed, equals the op's weights and reproduces out."""
    x = make_inputs(dataclasses.replace(BASE, dtype="float64"))
    out, _, s_dmask = flash_attn.flash_attn_func(x.q, x.k, x.v, P, return_attn_probs=True)
    rescale = 65536 / (65536 - dropout_threshold(P))
    weights = torch.where(torch.signbit(s_dmask), 0.0, s_dmask) * rescale
    torch.testing.assert_close(out, torch.einsum("bhij,bjhd->bihd", weights, x.v), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(s_dmask.abs().sum(-1), torch.ones(2, 3, 100, dtype=torch.float64), rtol=1e-13, atol=0)
