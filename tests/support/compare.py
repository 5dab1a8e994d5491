"""Comparison of a result with its reference: first where NaN and infinities are, then how large the error is."""

import torch


def _first(where: torch.Tensor) -> tuple[int, ...]:
    return tuple(where.nonzero()[0].tolist())


def compare(what: str, got, ref, plain=(), factor: float = 2.0, size: float = 0.0, context: str = "") -> None:
    """Raises AssertionError unless got is as near to ref as the rule says.

    The largest error may be factor times that of plain (the same computation, done plainly in the same type, in several
    orders of summation) plus 2 eps of the type times the largest reference value, or times size if that is more. NaN,
    inf and -inf must stand where they stand in ref.
    """
    where = f"{what} of {context}" if context else what
    if got.shape != ref.shape:
        raise AssertionError(f"{where}: shape {tuple(got.shape)}, expected {tuple(ref.shape)}")
    eps = torch.finfo(got.dtype).eps
    got, ref = got.detach().double().cpu(), ref.detach().double().cpu()
    for name, test in [("nan", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)]:
        wrong = test(got) != test(ref)
        if wrong.any():
            at = _first(wrong)
            text = f"{where}: {name} misplaced at {int(wrong.sum())} of {wrong.numel()} places, first {at}: "
            raise AssertionError(text + f"got {got[at].item()}, expected {ref[at].item()}")
    finite = torch.isfinite(ref)
    error = torch.where(finite, (got - ref).abs(), 0.0)
    if error.numel() == 0:
        return
    plain_errors = [torch.where(finite, (p.detach().double().cpu() - ref).abs(), 0.0).max().item() for p in plain]
    allowed = 2 * eps * max(torch.where(finite, ref.abs(), 0.0).max().item(), size) + factor * max(
        plain_errors, default=0.0
    )
    worst = error.max().item()
    if not worst <= allowed:
        at = _first(error == worst)
        text = f"{where}: error {worst:.3e} at {at}, allowed {allowed:.3e}: "
        raise AssertionError(text + f"got {got[at].item()!r}, expected {ref[at].item()!r}")


def assert_finite(what: str, tensor: torch.Tensor, context: str = "") -> None:
    """A reference that is not finite would agree with anything broken in the same way."""
    if not torch.isfinite(tensor).all():
        at = _first(~torch.isfinite(tensor))
        raise AssertionError(f"reference {what} of {context} is not finite at {at}: {tensor[at].item()}")


def assert_bitwise(what: str, got: torch.Tensor, expected: torch.Tensor, context: str = "") -> None:
    """The same bits, NaN counting as equal to NaN."""
    where = f"{what} of {context}" if context else what
    if got.shape != expected.shape or got.dtype != expected.dtype:
        text = f"got {got.dtype} {tuple(got.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
        raise AssertionError(f"{where}: {text}")
    equal = (got == expected) | (torch.isnan(got) & torch.isnan(expected))
    if not equal.all():
        at = _first(~equal)
        text = f"{where}: {int((~equal).sum())} of {equal.numel()} differ, first {at}: "
        raise AssertionError(text + f"got {got[at].item()!r}, expected {expected[at].item()!r}")
