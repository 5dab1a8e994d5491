"""Cross entropy of logits whose classes are cut over processes, beside the loss of one process."""

import pytest
import torch

from distributed_world import group_of
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

ROWS, CLASSES = 10, 12
CASES = {
    "plain": {},
    "all": {"label_smoothing": 0.1, "logit_scale": 1.3, "lse_square_scale": 0.01},
    "ignored": {"lse_square_scale": 0.02, "ignore_index": 4},
    "in place": {"label_smoothing": 0.2, "inplace_backward": True},
    "precomputed": {"precomputed_lse": True, "lse_square_scale": 0.01},
}


def make_inputs(dtype, change):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64) * 3
    labels = torch.arange(ROWS)
    if change == "-inf on a rank":
        logits[:, CLASSES // 2 :] = -torch.inf
        labels %= CLASSES // 2
    labels[3], labels[8] = 4, -100
    return logits.to(dtype), labels


def losses_of(logits, labels, options, group=None):
    """loss, z_loss and the gradient of the logits."""
    leaf = logits.clone().requires_grad_()
    options = dict(options)
    if options.pop("precomputed_lse", False):
        options["precomputed_lse"] = logits.double().logsumexp(1)
    if "ignore_index" in options:
        labels = labels.where(labels != -100, 4)
    loss, z_loss = cross_entropy_loss(leaf * 1.0, labels, **options, process_group=group)
    weights = torch.linspace(0.5, 1.5, ROWS, dtype=loss.dtype)
    return [loss.detach(), z_loss, *torch.autograd.grad(loss, leaf, weights)]


def compare(size, dtype, options, change=None):
    group = group_of(size)
    rank = torch.distributed.get_rank(group)
    logits, labels = make_inputs(dtype, change)
    expected = losses_of(logits, labels, options)
    found = losses_of(logits.chunk(size, dim=1)[rank], labels, options, group)
    expected[2] = expected[2].chunk(size, dim=1)[rank]
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_loss_of_one(world, case, dtype):
    world.run(compare, 2, dtype, CASES[case], ranks=2)


@pytest.mark.parametrize("size", [1, 4])
def test_other_numbers_of_processes(world, size):
    world.run(compare, size, torch.float64, CASES["all"], ranks=size)


def test_a_process_without_finite_logits(world):
    world.run(compare, 2, torch.float64, {"lse_square_scale": 0.01}, "-inf on a rank", ranks=2)


def mean_of_module():
    logits, labels = make_inputs(torch.float64, None)
    rank = torch.distributed.get_rank(group_of(2))
    options = {"label_smoothing": 0.1, "lse_square_scale": 0.01, "return_z_loss": True}
    expected = CrossEntropyLoss(**options)(logits, labels)
    found = CrossEntropyLoss(**options, process_group=group_of(2))(logits.chunk(2, dim=1)[rank], labels)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_module(world):
    world.run(mean_of_module, ranks=2)


def label_out_of_range():
    logits, labels = make_inputs(torch.float64, None)
    labels[0] = CLASSES
    text = f"^cross_entropy_loss: labels: expected classes from 0 to {CLASSES - 1}, or ignore_index=-100, got {CLASSES}"
    with pytest.raises(ValueError, match=text):
        cross_entropy_loss(logits.chunk(2, dim=1)[0], labels, process_group=group_of(2))


def test_labels_are_those_of_all_ranks(world):
    world.run(label_out_of_range, ranks=2)
