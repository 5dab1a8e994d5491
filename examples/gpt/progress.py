"""One progress bar for the whole demo: animated on a terminal, a few lines in a log file."""

from __future__ import annotations

import sys

from tqdm import tqdm  # type: ignore[import-untyped]


def progress_bar(total: int, description: str, unit: str, shown: bool = True) -> tqdm:
    """A tqdm bar on stderr, if it is to be shown."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        mininterval=interval,
        maxinterval=interval,
        dynamic_ncols=True,
        disable=not shown,
    )
