"""A sample of the cases that still runs every kernel. `python3 -m sampling` prints the seed that it has by default."""

import hashlib
import itertools
import random
import sys
from collections import defaultdict

from build_tools import cuda_objects
from paths import ROOT


def seed_of_sources() -> int:
    """A digest of csrc: the same sources have the same sample, wherever and whenever they are tested."""
    digest = hashlib.sha256()
    for path in sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file()):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return int(digest.hexdigest(), 16) % 2**31


def kernel_head_dim(row: tuple) -> int:
    """The head_dim of the kernels that run a case: theirs are those of the folder of the architecture."""
    case, sim = row
    head_dims = cuda_objects.head_dims(cuda_objects.SOURCES / f"sm{sim.compute_capability}")
    return min(d for d in head_dims if d >= max(case.head_dim, case.head_dim_v))


def group_of(row: tuple) -> tuple:
    """What is checked, and by which kernels. Cases that run all passes come first."""
    case, sim = row
    check = sim.check
    if check == "reference" and not (case.seqlen_q and case.seqlen_k):
        check = "empty"
    elif check == "reference" and case.page_size:
        check = "paged"
    return check != "reference", check, sim.compute_capability, kernel_head_dim(row), case.dtype, sim.smem


def sample(rows: list[tuple], size: int, seed: int) -> list[tuple]:
    """`size` of the rows, in their order: one of each group, then a second one of each, and so on.

    However small the size, a case of every kernel is among them.
    """
    generator = random.Random(seed)
    groups: dict[tuple, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[group_of(row)].append(index)
    for group in groups.values():
        generator.shuffle(group)
    rounds = itertools.zip_longest(*(groups[key] for key in sorted(groups)))
    chosen = [index for each in rounds for index in each if index is not None]
    kernels = sum(key[1] == "reference" for key in groups)
    return [rows[index] for index in sorted(chosen[: max(size, kernels)])]


if __name__ == "__main__":
    sys.stdout.write(f"{seed_of_sources()}\n")
