"""Cross entropy as a module, under its upstream import path."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from flash_attn._checks import describe, reject
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CrossEntropyLoss(nn.Module):
    """cross_entropy_loss, summed or averaged over the rows whose label is not ignore_index.

    Args:
        reduction: "mean", over the rows that count (NaN if none does); "sum", or "none": one loss per row.
        return_z_loss: also return z_loss, reduced likewise; it is part of the loss already.
        ignore_index, label_smoothing, logit_scale, lse_square_scale, inplace_backward, process_group: as in
            flash_attn.ops.triton.cross_entropy.cross_entropy_loss.

    Raises:
        ValueError: reduction is none of the three.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: ProcessGroup | None = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            reasons = [f'reduction: expected "mean", "sum" or "none", got {describe(reduction)}']
            reject(ValueError, "CrossEntropyLoss", reasons)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def forward(
        self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss, or (loss, z_loss), each 0-dim, or (num_rows,) with reduction "none".

        Args:
            input: (num_rows, num_classes), the logits.
            target: (num_rows,), the labels.
            precomputed_lse: (num_rows,), as in cross_entropy_loss, which has the errors, too.
        """
        losses = cross_entropy_loss(
            input,
            target,
            precomputed_lse,
            self.label_smoothing,
            self.logit_scale,
            self.lse_square_scale,
            self.ignore_index,
            self.inplace_backward,
            self.process_group,
        )
        loss, z_loss = (self._reduce(x, target) for x in losses)
        return (loss, z_loss) if self.return_z_loss else loss

    def _reduce(self, losses: Tensor, target: Tensor) -> Tensor:
        if self.reduction == "none":
            return losses
        total = losses.sum()
        return total if self.reduction == "sum" else total / (target != self.ignore_index).sum()
