"""Cross entropy with label smoothing, a z loss and logits that are cut over ranks, in plain torch operations.

Nothing of the size of the logits is kept for the backward pass but the logits themselves: probabilities are computed a
second time from the logarithm of their sum, as attention weights are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flash_attn._checks import as_float, as_int, describe, optional_tensor_reasons, reject
from flash_attn.utils.distributed import all_gather_raw, all_reduce_raw

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Elements of logits that are converted to float32 at a time: what fits a cache, or what fills a GPU.
_CPU_PIECE, _GPU_PIECE = 1 << 18, 1 << 24


class _Options(NamedTuple):
    """What the loss is, apart from tensors: of total_classes, this rank has num_classes from first_class on."""

    label_smoothing: float
    logit_scale: float
    lse_square_scale: float
    ignore_index: int
    first_class: int
    num_classes: int
    total_classes: int


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of every row of logits: lse - log-likelihood of the label, where lse = logsumexp(logits).

    Computed in float32 (float64 for float64 logits), differentiable once in logits. A row whose label is ignore_index
    has loss 0 and gradient 0, whatever its logits are.

    Args:
        logits: (num_rows, num_classes), floating point; with process_group, this rank's columns: rank r has classes
            r * num_classes to (r + 1) * num_classes - 1, and all ranks have the same rows.
        labels: (num_rows,), int32 or int64: a class of all ranks, the same on every rank, or ignore_index.
        precomputed_lse: (num_rows,), floating point: logsumexp of each row of logits, of this rank's columns alone, so
            that it is not computed; of no use, and ignored, if logit_scale is not 1. Gets no gradient.
        label_smoothing: in [0, 1]: this share of each label is spread evenly over all classes (of all ranks): Szegedy
            et al., "Rethinking the Inception Architecture for Computer Vision" (2016), section 7.
        logit_scale: factor of the logits.
        lse_square_scale: adds z_loss = lse_square_scale * lse ** 2: Chowdhery et al., "PaLM" (2022), section 5. >= 0.
        ignore_index: label of rows that do not count.
        inplace_backward: write the gradient into logits, which lose their values in the backward pass.
        process_group: the ranks over which the classes are cut. None: this process has all.

    Returns:
        loss: (num_rows,), float32 (float64 for float64 logits), including z_loss; the same on every rank.
        z_loss: likewise, z_loss alone, for logging. Not differentiable.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a dtype, device, shape or value violates the above. Labels are looked at on the CPU only; elsewhere
            one that is no class fails a device-side assertion, as in torch.nn.functional.cross_entropy.
    """
    options = label_smoothing, logit_scale, lse_square_scale, ignore_index, inplace_backward, process_group
    return CrossEntropyLoss.apply(logits, labels, precomputed_lse, *options)


class CrossEntropyLoss(torch.autograd.Function):
    """cross_entropy_loss under its 2.8.3 class name: apply takes all arguments by position."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        precomputed_lse: Tensor | None = None,
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        ignore_index: int = -100,
        inplace_backward: bool = False,
        process_group: ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See cross_entropy_loss."""
        _check_tensors(logits, labels, precomputed_lse)
        numbers = _check_numbers(label_smoothing, logit_scale, lse_square_scale, ignore_index)
        options = _Options(*numbers, *_classes_of(logits, process_group))
        labels = labels.long()
        _check_labels(labels, options)
        if precomputed_lse is not None and options.logit_scale == 1:
            lse = precomputed_lse.to(_compute_dtype(logits))
        else:
            lse = _lse_of(logits, options)
        likelihood = _likelihood_of(logits, labels, options)
        if process_group is not None:
            lse = all_gather_raw(lse[None], process_group)[0].logsumexp(0)
            likelihood = all_reduce_raw(likelihood, process_group)[0]
        ignored = labels == options.ignore_index
        # No z loss is zero, also where lse is infinite.
        z_loss = options.lse_square_scale * lse.square() if options.lse_square_scale > 0 else torch.zeros_like(lse)
        # Not in place: torch.compile of torch 2.11 then loses the gradient.
        z_loss = z_loss.masked_fill(ignored, 0)
        loss = (lse - likelihood + z_loss).masked_fill(ignored, 0)
        ctx.options, ctx.inplace_backward = options, inplace_backward
        ctx.save_for_backward(logits, labels, lse)
        ctx.mark_non_differentiable(z_loss)
        return loss, z_loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of logits, (num_rows, num_classes), in the dtype of logits."""
        logits, labels, lse = ctx.saved_tensors
        with torch.no_grad():
            dlogits = _gradient(logits, labels, lse, dloss, ctx.options, ctx.inplace_backward)
        if torch.is_grad_enabled():
            dlogits = _DifferentiableOnce.apply(dlogits, logits, dloss)
        return dlogits, *(None,) * 8


class _DifferentiableOnce(torch.autograd.Function):
    """Passes a gradient on. To differentiate it, by the tensors it was computed from, is an error and not zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *computed_from: Tensor) -> Tensor:
        """The gradient."""
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        """Raises RuntimeError."""
        raise RuntimeError("cross_entropy_loss: second derivatives are not available")


def _gradient(logits: Tensor, labels: Tensor, lse: Tensor, dloss: Tensor, options: _Options, inplace: bool) -> Tensor:
    """Gradient of logits for the gradient of the losses, dloss (num_rows,)."""
    dlogits = logits if inplace else torch.empty_like(logits)
    ignored = (labels == options.ignore_index)[:, None]
    dloss = dloss[:, None] * options.logit_scale
    # The derivative of lse is the probability; the z loss adds 2 * lse_square_scale * lse of it.
    dlse = dloss if options.lse_square_scale == 0 else dloss * (1 + 2 * options.lse_square_scale * lse[:, None])
    column, is_here = _columns_of(labels, options)
    of_label = dloss * (1 - options.label_smoothing) * is_here[:, None]
    of_each = dloss * (options.label_smoothing / options.total_classes)
    for rows in _pieces(logits):
        gradient = (_scores(logits[rows], lse.dtype, options) - lse[rows, None]).exp_().mul_(dlse[rows])
        if options.label_smoothing > 0:
            gradient.sub_(of_each[rows])
        gradient.scatter_add_(1, column[rows, None], -of_label[rows])
        dlogits[rows] = gradient.masked_fill_(ignored[rows], 0)
    return dlogits


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _pieces(logits: Tensor) -> Iterator[slice]:
    """Slices of rows, so that no float32 copy of all logits is needed. Under torch.compile, which fuses, one of all."""
    num_rows, num_classes = logits.shape
    step = max(1, (_CPU_PIECE if logits.device.type == "cpu" else _GPU_PIECE) // num_classes)
    step = max(1, num_rows) if torch.compiler.is_compiling() else step
    for first in range(0, num_rows, step):
        yield slice(first, first + step)


def _scores(logits: Tensor, dtype: torch.dtype, options: _Options) -> Tensor:
    """The scaled logits; the given tensor itself if nothing changes."""
    scores = logits.to(dtype)
    return scores if options.logit_scale == 1 else scores * options.logit_scale


def _lse_of(logits: Tensor, options: _Options) -> Tensor:
    """logsumexp of each row of the scaled logits, (num_rows,)."""
    lse = logits.new_empty(logits.shape[0], dtype=_compute_dtype(logits))
    for rows in _pieces(logits):
        lse[rows] = _scores(logits[rows], lse.dtype, options).logsumexp(1)
    return lse


def _columns_of(labels: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    """The column of each label and whether this rank has it, both (num_rows,). Where it has not: column 0."""
    column = labels - options.first_class
    is_here = (column >= 0) & (column < options.num_classes) & (labels != options.ignore_index)
    return column.where(is_here, 0), is_here


def _likelihood_of(logits: Tensor, labels: Tensor, options: _Options) -> Tensor:
    """What this rank's classes add to the logit of the (smoothed) label, scaled: (num_rows,)."""
    column, is_here = _columns_of(labels, options)
    dtype = _compute_dtype(logits)
    likelihood = logits.gather(1, column[:, None])[:, 0].to(dtype).masked_fill_(~is_here, 0)
    if options.label_smoothing > 0:
        total = torch.cat([logits[rows].sum(1, dtype=dtype) for rows in _pieces(logits)] or [likelihood])
        each = options.label_smoothing / options.total_classes
        likelihood = (1 - options.label_smoothing) * likelihood + each * total
    return likelihood.mul_(options.logit_scale)


def _classes_of(logits: Tensor, process_group: Any) -> tuple[int, int, int]:
    """first_class, num_classes and total_classes."""
    num_classes = logits.shape[1]
    if process_group is None:
        return 0, num_classes, num_classes
    if not isinstance(process_group, torch.distributed.ProcessGroup):
        expected = "a torch.distributed.ProcessGroup that this rank belongs to, or None"
        reject(TypeError, "cross_entropy_loss", [f"process_group: expected {expected}, got {describe(process_group)}"])
    rank = torch.distributed.get_rank(process_group)
    return rank * num_classes, num_classes, torch.distributed.get_world_size(process_group) * num_classes


def _check_tensors(logits: Any, labels: Any, precomputed_lse: Any) -> None:
    tensors = {"logits": logits, "labels": labels}
    reasons = [
        f"{name}: expected torch.Tensor, got {describe(value)}"
        for name, value in tensors.items()
        if not isinstance(value, Tensor)
    ]
    reasons += optional_tensor_reasons({"precomputed_lse": precomputed_lse})
    if not reasons and not logits.is_floating_point():
        reasons.append(f"logits: expected a floating dtype, got {logits.dtype}")
    if not reasons and labels.dtype not in (torch.int32, torch.int64):
        reasons.append(f"labels: expected dtype torch.int64 or torch.int32, got {labels.dtype}")
    if reasons:
        reject(TypeError, "cross_entropy_loss", reasons)
    if logits.dim() != 2 or logits.shape[1] == 0:
        expected = "shape (num_rows, num_classes) with num_classes > 0"
        reject(ValueError, "cross_entropy_loss", [f"logits: expected {expected}, got {tuple(logits.shape)}"])
    per_row = {"labels": labels, "precomputed_lse": precomputed_lse}
    for name, value in per_row.items():
        if value is not None and value.shape != logits.shape[:1]:
            reasons.append(f"{name}: expected shape (num_rows={logits.shape[0]},), got {tuple(value.shape)}")
        if value is not None and value.device != logits.device:
            reasons.append(f"{name}: expected the device of logits, {logits.device}, got {value.device}")
    if reasons:
        reject(ValueError, "cross_entropy_loss", reasons)


def _check_numbers(
    label_smoothing: Any, logit_scale: Any, lse_square_scale: Any, ignore_index: Any
) -> tuple[float, float, float, int]:
    numbers = {"label_smoothing": label_smoothing, "logit_scale": logit_scale, "lse_square_scale": lse_square_scale}
    values = {name: as_float(number) for name, number in numbers.items()}
    index = as_int(ignore_index)
    reasons = [
        f"{name}: expected float, got {describe(numbers[name])}" for name, value in values.items() if value is None
    ]
    if index is None:
        reasons.append(f"ignore_index: expected int, got {describe(ignore_index)}")
    if reasons:
        reject(TypeError, "cross_entropy_loss", reasons)
    smoothing, scale, square_scale = values.values()
    if not 0 <= smoothing <= 1:
        reasons.append(f"label_smoothing: expected a share in [0, 1], got {smoothing}")
    if not square_scale >= 0:
        reasons.append(f"lse_square_scale: expected a number >= 0, got {square_scale}")
    if reasons:
        reject(ValueError, "cross_entropy_loss", reasons)
    return smoothing, scale, square_scale, index


def _check_labels(labels: Tensor, options: _Options) -> None:
    """Check that each label is a class, or ignore_index."""
    is_known = (labels >= 0) & (labels < options.total_classes) | (labels == options.ignore_index)
    expected = f"classes from 0 to {options.total_classes - 1}, or ignore_index={options.ignore_index}"
    has_values = type(labels) is Tensor and not torch.compiler.is_compiling()
    if labels.device.type != "cpu" or not has_values:
        torch._assert_async(is_known.all(), f"cross_entropy_loss: labels: expected {expected}")
    elif not is_known.all():
        unknown = labels[~is_known]
        reject(ValueError, "cross_entropy_loss", [f"labels: expected {expected}, got {unknown[0].item()}"])
