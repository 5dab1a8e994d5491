"""Text that every machine has: the source code of Python's standard library, as bytes."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Skipped: installed packages (they differ between machines) and test suites (some systems ship Python without them).
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}
VALIDATION_EVERY = 20  # one file in 20 is for validation
SMALLEST_CORPUS = 1_000_000  # bytes


@dataclass(frozen=True)
class Corpus:
    """Training and validation text, each a 1-D uint8 tensor; no file is in both."""

    train: Tensor  # [train_bytes]
    validation: Tensor  # [validation_bytes]
    num_files: int

    @classmethod
    def from_standard_library(cls) -> Corpus:
        """All .py files of the running Python's standard library, sorted by name."""
        root = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(
            (path for path in root.rglob("*.py") if not SKIPPED_FOLDERS & set(path.relative_to(root).parts)),
            key=lambda path: path.relative_to(root).as_posix(),
        )
        train = _join(path for index, path in enumerate(files) if index % VALIDATION_EVERY)
        validation = _join(files[::VALIDATION_EVERY])
        if len(train) + len(validation) < SMALLEST_CORPUS:
            raise SystemExit(f"expected at least {SMALLEST_CORPUS:,} bytes of .py files in {root}, got {len(train):,}")
        return cls(train, validation, len(files))


def _join(paths: Iterable[Path]) -> Tensor:
    text = b"\n\n".join(path.read_bytes() for path in paths)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and next-byte targets, both [len(starts), context] int64, of the windows that begin at `starts`."""
    index = starts[:, None] + torch.arange(context + 1)
    chunk = text[index].long()
    return chunk[:, :-1], chunk[:, 1:]


class TrainingBatches:
    """An endless iterator over random windows; the same seed gives the same batches in the same order."""

    def __init__(self, text: Tensor, batch_size: int, context: int, seed: int):
        self.text, self.batch_size, self.context = text, batch_size, context
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> TrainingBatches:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        last_start = self.text.numel() - self.context
        starts = torch.randint(last_start, (self.batch_size,), generator=self.generator)
        return windows(self.text, starts, self.context)


def validation_batches(text: Tensor, num_windows: int, batch_size: int, context: int) -> list[tuple[Tensor, Tensor]]:
    """`num_windows` evenly spaced windows: the same for every seed."""
    starts = torch.linspace(0, text.numel() - context - 1, num_windows, dtype=torch.float64).long()
    return [windows(text, part, context) for part in starts.split(batch_size)]
