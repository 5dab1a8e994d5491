"""Cross entropy beside torch.nn.functional.cross_entropy in float64: losses, gradients, messages."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.triton import cross_entropy as module
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from plain_attention import assert_same

ROWS, CLASSES = 9, 37
# Relative error of losses and gradients: float32 inside, and gradients rounded to the dtype of the logits.
LOSS_ERROR = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
GRADIENT_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}

# Name: options, and what is done to logits and labels.
CASES = {
    "plain": ({}, None),
    "smoothing": ({"label_smoothing": 0.1}, None),
    "nothing but smoothing": ({"label_smoothing": 1.0}, None),
    "scale": ({"logit_scale": 0.3}, None),
    "negative scale": ({"logit_scale": -1.5, "label_smoothing": 0.2}, None),
    "z loss": ({"lse_square_scale": 0.01}, None),
    "all": ({"label_smoothing": 0.1, "logit_scale": 1.7, "lse_square_scale": 0.02}, None),
    "ignored": ({"lse_square_scale": 0.01}, "ignored"),
    "ignored, by a class": ({"ignore_index": 3, "label_smoothing": 0.1}, "ignored"),
    "all ignored": ({"lse_square_scale": 0.01}, "all ignored"),
    "ignored NaN": ({"label_smoothing": 0.1, "lse_square_scale": 0.01}, "ignored NaN"),
    "ignored -inf": ({}, "ignored -inf"),
    "-inf": ({"lse_square_scale": 0.01}, "-inf"),
    "-inf at a label": ({}, "-inf at a label"),
    "-inf at a label, smoothed": ({"label_smoothing": 0.1}, "-inf at a label"),
    "-inf smoothed": ({"label_smoothing": 0.1}, "-inf"),
    "huge": ({"lse_square_scale": 1e-6}, "huge"),
    "int32 labels": ({"label_smoothing": 0.1}, "int32"),
    "one class": ({"lse_square_scale": 0.1}, "one class"),
    "no rows": ({"label_smoothing": 0.1}, "no rows"),
    "transposed": ({"label_smoothing": 0.1}, "transposed"),
}


def make_inputs(change, dtype, ignore_index):
    generator = torch.Generator().manual_seed(0)
    columns = 1 if change == "one class" else CLASSES
    logits = torch.randn(ROWS, columns, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, columns, (ROWS,), generator=generator)
    if change is not None and "ignored" in change:
        labels[:: 1 if change == "all ignored" else 3] = ignore_index
    if change == "ignored NaN":
        logits[0], logits[3, 2] = torch.nan, torch.inf
    elif change == "ignored -inf":
        logits[0] = -torch.inf
    elif change == "-inf":
        logits[:, 5], labels[labels == 5] = -torch.inf, 6
    elif change == "-inf at a label":
        logits[range(ROWS), labels] = -torch.inf
    elif change == "huge":
        logits *= 2000
    elif change == "no rows":
        logits, labels = logits[:0], labels[:0]
    logits = logits.t().contiguous().t() if change == "transposed" else logits
    return logits.to(dtype).requires_grad_(), labels.int() if change == "int32" else labels


def reference(logits, labels, label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, ignore_index=-100):
    """loss and z_loss of each row, in float64; rows that do not count have no logits."""
    labels, counts = labels.long(), labels != ignore_index
    logits = logits.masked_fill(~counts[:, None], 0.0)
    scores = logit_scale * logits
    loss = F.cross_entropy(scores, labels, reduction="none", label_smoothing=label_smoothing, ignore_index=ignore_index)
    z_loss = lse_square_scale * scores.logsumexp(1).square() * counts
    return loss + z_loss, z_loss


def assert_within(actual, expected, error):
    expected = expected.detach()
    torch.testing.assert_close(actual.detach().double(), expected, rtol=error, atol=error, equal_nan=True)


def check(options, change, dtype, **more):
    logits, labels = make_inputs(change, dtype, options.get("ignore_index", -100))
    exact = logits.detach().double().requires_grad_()
    expected, expected_z = reference(exact, labels, **options)
    dloss = torch.linspace(0.5, 1.5, len(labels), dtype=torch.float64)
    (expected_gradient,) = torch.autograd.grad(expected, exact, dloss)
    precomputed = {"precomputed_lse": exact.detach().logsumexp(1)} if more.pop("precomputed", False) else {}
    leaf = logits
    logits = logits * 1.0 if "inplace_backward" in more else logits
    loss, z_loss = cross_entropy_loss(logits, labels, **precomputed, **options, **more)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == z_loss.dtype == wanted
    assert loss.requires_grad and not z_loss.requires_grad
    assert_within(loss, expected, LOSS_ERROR[dtype])
    assert_within(z_loss, expected_z, LOSS_ERROR[dtype])
    (gradient,) = torch.autograd.grad(loss, leaf, dloss.to(wanted))
    assert gradient.dtype == dtype
    assert_within(gradient, expected_gradient, GRADIENT_ERROR[dtype])
    if "inplace_backward" in more:
        assert_same([logits.detach()], [gradient])


@pytest.mark.parametrize("dtype", LOSS_ERROR, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients(case, dtype):
    check(*CASES[case], dtype)


@pytest.mark.parametrize("case", ["plain", "all", "ignored NaN", "huge", "no rows", "transposed"])
@pytest.mark.parametrize("how", ["inplace_backward", "precomputed", "pieces"])
def test_other_ways(case, how, monkeypatch):
    """The gradient in the memory of the logits, a given lse, and few rows at a time."""
    if how == "pieces":
        monkeypatch.setattr(module, "_CPU_PIECE", 2 * CLASSES + 1)
    for dtype in (torch.float64, torch.bfloat16):
        check(*CASES[case], dtype, **({how: True} if how != "pieces" else {}))


def test_gradient_by_finite_differences():
    logits, labels = make_inputs("ignored", torch.float64, -100)
    few = labels.where(labels < 0, labels % 5)
    torch.autograd.gradcheck(lambda x: cross_entropy_loss(x, few, None, 0.1, 1.3, 0.05)[0], logits[:, :5])
    (gradient,) = torch.autograd.grad(cross_entropy_loss(logits, labels)[0].sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="cross_entropy_loss: second derivatives are not available"):
        gradient.sum().backward()


def test_logits_that_were_overwritten():
    """A second backward pass, or another user of the logits, fails instead of reading the gradient."""
    logits = make_inputs(None, torch.float32, -100)[0] * 1.0
    loss = cross_entropy_loss(logits, torch.arange(ROWS), inplace_backward=True)[0].sum()
    other = logits.square().sum()
    loss.backward(retain_graph=True)
    for again in (loss, other):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            again.backward()


def test_a_leaf_may_be_overwritten():
    leaf, labels = make_inputs("ignored", torch.float32, -100)
    expected = torch.autograd.grad(cross_entropy_loss(leaf, labels)[0].sum(), leaf)
    cross_entropy_loss(leaf, labels, inplace_backward=True)[0].sum().backward()
    assert_same([leaf.grad, leaf.detach()], [*expected, *expected])


def test_what_is_kept():
    """Nothing of the size of the logits is kept beside them, and the gradient has their dtype."""
    kept = []
    logits = torch.randn(64, 1000, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss, _ = cross_entropy_loss(logits, torch.arange(64), None, 0.1, 2.0, 0.01)
    large = [x for x in kept if x.numel() > 64]
    assert [x.data_ptr() for x in large] == [logits.data_ptr()]
    assert torch.autograd.grad(loss.sum(), logits)[0].dtype == torch.bfloat16


class Storages(TorchDispatchMode):
    """Records the sizes in bytes of what operations return, by address."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self.sizes[storage.data_ptr()] = max(storage.nbytes(), self.sizes.get(storage.data_ptr(), 0))
        return result


@pytest.mark.parametrize("inplace", [False, True])
def test_scratch_memory(inplace, monkeypatch):
    """Beside the logits and their gradient no tensor has a quarter of their size."""
    monkeypatch.setattr(module, "_CPU_PIECE", 4 * CLASSES)
    logits = torch.randn(100, CLASSES, dtype=torch.bfloat16).requires_grad_()
    size = logits.untyped_storage().nbytes()
    with Storages() as storages:
        loss, _ = cross_entropy_loss(logits, torch.arange(100) % 7, None, 0.1, 2.0, 0.01, inplace_backward=inplace)
        torch.autograd.grad(loss, logits, torch.ones_like(loss))
    assert [x for x in storages.sizes.values() if x > size // 4] == [size] * (1 if inplace else 2)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("change", [None, "ignored", "all ignored"])
def test_module(change, reduction):
    logits, labels = make_inputs(change, torch.float64, -100)
    options = {"label_smoothing": 0.1, "logit_scale": 1.2, "lse_square_scale": 0.01}
    expected = reference(logits, labels, **options)
    count = int((labels != -100).sum())
    if reduction != "none":
        expected = [x.sum() / (count if reduction == "mean" else 1) for x in expected]
    found = CrossEntropyLoss(reduction=reduction, return_z_loss=True, **options)(logits, labels)
    for actual, wanted in zip(found, expected, strict=True):
        assert_within(actual, wanted, 1e-12)
        assert actual.isnan().all() == (count == 0 and reduction == "mean")
    assert_same([CrossEntropyLoss(reduction=reduction, **options)(logits, labels)], found[:1])
    lse = logits.detach().logsumexp(1)
    given = CrossEntropyLoss(reduction=reduction)(logits, labels, lse)
    assert_within(given, CrossEntropyLoss(reduction=reduction)(logits, labels), 1e-12)


def test_under_torch_compile():
    logits, labels = make_inputs("ignored", torch.float32, -100)
    loss = CrossEntropyLoss(label_smoothing=0.1, lse_square_scale=0.01)
    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(logits, labels)
    (gradient,) = torch.autograd.grad(found, logits)
    expected = loss(logits, labels)
    assert_within(found, expected.double(), 1e-6)
    assert_within(gradient, torch.autograd.grad(expected, logits)[0].double(), 1e-6)
    with pytest.raises(RuntimeError, match="cross_entropy_loss: labels: expected classes from 0 to 36, or ignore_ind"):
        torch.compile(loss, backend="aot_eager", fullgraph=True)(logits, labels + CLASSES)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_tensors_without_values(device):
    with FakeTensorMode():
        logits = torch.empty(4, 5, dtype=torch.bfloat16, device=device, requires_grad=True)
        loss, z_loss = cross_entropy_loss(logits, torch.zeros(4, dtype=torch.int64, device=device), None, 0.1)
        loss.sum().backward()
    assert loss.shape == z_loss.shape == (4,)
    assert (loss.dtype, logits.grad.dtype, logits.grad.shape) == (torch.float32, torch.bfloat16, (4, 5))


# Messages: what is changed, the error, and its text after the name of the function.
X, Y = torch.zeros(3, 5), torch.tensor([0, 4, -100])
BAD = [
    ({"logits": None}, TypeError, r"logits: expected torch.Tensor, got NoneType None"),
    ({"logits": X.long()}, TypeError, r"logits: expected a floating dtype, got torch.int64"),
    ({"labels": Y.float()}, TypeError, r"labels: expected dtype torch.int64 or torch.int32, got torch.float32"),
    ({"labels": [0, 1, 2]}, TypeError, r"labels: expected torch.Tensor, got list \[0, 1, 2\]"),
    ({"precomputed_lse": 1.0}, TypeError, r"precomputed_lse: expected torch.Tensor or None, got float 1.0"),
    ({"logits": X[None]}, ValueError, r"logits: expected shape \(num_rows, num_classes\) .*, got \(1, 3, 5\)"),
    ({"logits": X[:, :0]}, ValueError, r"logits: expected shape .* with num_classes > 0, got \(3, 0\)"),
    ({"labels": Y[:2]}, ValueError, r"labels: expected shape \(num_rows=3,\), got \(2,\)"),
    ({"labels": Y.to("meta")}, ValueError, r"labels: expected the device of logits, cpu, got meta"),
    ({"precomputed_lse": X}, ValueError, r"precomputed_lse: expected shape \(num_rows=3,\), got \(3, 5\)"),
    ({"labels": Y + 1}, ValueError, r"labels: expected classes from 0 to 4, or ignore_index=-100, got 5"),
    ({"labels": -Y}, ValueError, r"labels: expected classes from 0 to 4, or ignore_index=-100, got -4"),
    ({"ignore_index": 1}, ValueError, r"labels: expected classes from 0 to 4, or ignore_index=1, got -100"),
    ({"ignore_index": 1.5}, TypeError, r"ignore_index: expected int, got float 1.5"),
    ({"label_smoothing": 1.1}, ValueError, r"label_smoothing: expected a share in \[0, 1\], got 1.1"),
    ({"label_smoothing": "a"}, TypeError, r"label_smoothing: expected float, got str 'a'"),
    ({"logit_scale": None}, TypeError, r"logit_scale: expected float, got NoneType None"),
    ({"lse_square_scale": -1.0}, ValueError, r"lse_square_scale: expected a number >= 0, got -1.0"),
    ({"process_group": 0}, TypeError, r"process_group: expected a torch.distributed.ProcessGroup .*, got int 0"),
]


@pytest.mark.parametrize(("changes", "error", "text"), BAD, ids=lambda x: str(list(x)) if isinstance(x, dict) else "")
def test_messages(changes, error, text):
    with pytest.raises(error, match=f"^cross_entropy_loss: {text}$"):
        cross_entropy_loss(**{"logits": X, "labels": Y, **changes})


def test_message_of_the_module():
    with pytest.raises(ValueError, match=r'^CrossEntropyLoss: reduction: expected "mean", "sum" or "none", got str'):
        CrossEntropyLoss(reduction="batchmean")
