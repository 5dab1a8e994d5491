"""Comparison of results with references: first the positions of NaN and infinities, then the error."""

import torch


def _first(where: torch.Tensor) -> tuple[int, ...]:
    return tuple(where.nonzero()[0].tolist())


def compare(what: str, got, ref, plain=(), factor: float = 2.0, size: float = 0.0, context: str = "") -> None:
    """Raise AssertionError unless `got` is close to `ref`.

    Maximum error: factor times that of `plain` (plain operations in the same dtype, in several summation orders)
    + 2 eps of the dtype * max(max|ref|, size). NaN, inf and -inf must be at the same positions as in ref.
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
    """Check that a reference is finite: NaN or inf in it could match a broken result."""
    if not torch.isfinite(tensor).all():
        at = _first(~torch.isfinite(tensor))
        raise AssertionError(f"reference {what} of {context} is not finite at {at}: {tensor[at].item()}")


def assert_bitwise(what: str, got: torch.Tensor, expected: torch.Tensor, context: str = "") -> None:
    """Equal bits; any two NaN are equal."""
    where = f"{what} of {context}" if context else what
    if got.shape != expected.shape or got.dtype != expected.dtype:
        text = f"got {got.dtype} {tuple(got.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
        raise AssertionError(f"{where}: {text}")
    equal = (got == expected) | (torch.isnan(got) & torch.isnan(expected))
    if not equal.all():
        at = _first(~equal)
        text = f"{where}: {int((~equal).sum())} of {equal.numel()} differ, first {at}: "
        raise AssertionError(text + f"got {got[at].item()!r}, expected {expected[at].item()!r}")
