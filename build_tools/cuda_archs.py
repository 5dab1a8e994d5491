"""For which GPUs CUDA code is compiled.

An architecture is written as torch writes it in TORCH_CUDA_ARCH_LIST: "8.0", "9.0a", "8.0+PTX", several of them
separated by semicolons, commas or spaces. The point may be missing: flash-attn's own setup.py takes "80;90".
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

OWN_VARIABLE = "FLASH_ATTN_CUDA_ARCHS"
TORCH_VARIABLE = "TORCH_CUDA_ARCH_LIST"

# Machine code for the two families that most GPUs of data centres belong to, and intermediate code for all others.
DEFAULT = "8.0+PTX;9.0a"
OLDEST = (8, 0)  # cp.async, bf16 and m16n8k16
HOPPER = (9, 0)

# The families that TORCH_CUDA_ARCH_LIST may name; those before Ampere are too old for this package.
FAMILIES = {
    "maxwell": "5.2",
    "pascal": "6.1",
    "volta": "7.0",
    "turing": "7.5",
    "ampere": "8.0;8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell": "10.0;12.0+PTX",
}


class ArchError(ValueError):
    """The choice of architectures makes no sense; the text says why and what would."""


@dataclass(frozen=True, order=True)
class Arch:
    """A compute capability to compile for, with intermediate code (PTX) for newer GPUs too if so asked."""

    major: int
    minor: int
    ptx: bool = False

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}" + ("+PTX" if self.ptx else "")

    @property
    def capability(self) -> tuple[int, int]:
        """(major, minor), as torch.cuda.get_device_capability gives it."""
        return self.major, self.minor

    @property
    def machine_code(self) -> str:
        """What nvcc calls its machine code. 9.0 always means sm_90a, which runs on just the same GPUs."""
        return f"sm_{self.major}{self.minor}" + ("a" if self.capability == HOPPER else "")

    @property
    def intermediate_code(self) -> str:
        """What nvcc calls its PTX: never that of sm_90a, which no other GPU could run."""
        return f"compute_{self.major}{self.minor}"


class Choice(NamedTuple):
    """Architectures, and in a few words why these."""

    archs: tuple[Arch, ...]
    reason: str


def parse(text: str, variable: str = OWN_VARIABLE) -> tuple[Arch, ...]:
    """The architectures of a list. Raises ArchError for what is none."""
    archs: list[Arch] = []
    for item in filter(None, re.split(r"[;,\s]+", text)):
        if item.lower() in FAMILIES:
            archs += parse(FAMILIES[item.lower()], variable)
            continue
        match = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", item, re.IGNORECASE)
        if match is None:
            raise ArchError(f'{variable}={text}: "{item}" is no architecture; write for example {DEFAULT}')
        archs.append(Arch(int(match[1]), int(match[2]), ptx=bool(match[4])))
        # A list for other packages as well may ask for features that our kernels for these GPUs do not use.
        if match[3] and archs[-1].capability != HOPPER and variable != TORCH_VARIABLE:
            suffix = match[3].lower()
            raise ArchError(f'{variable}={text}: "{item}": no suffix {suffix} is known but 9.0a; write {archs[-1]}')
    return _without_repeats(archs)


def _without_repeats(archs: Iterable[Arch]) -> tuple[Arch, ...]:
    with_ptx: dict[tuple[int, int], bool] = {}
    for arch in archs:
        with_ptx[arch.capability] = arch.ptx or with_ptx.get(arch.capability, False)
    return tuple(Arch(*capability, ptx=ptx) for capability, ptx in sorted(with_ptx.items()))


def choose(environment: Mapping[str, str], present: Sequence[tuple[int, int]], known: Collection[str]) -> Choice:
    """What to compile for: what the environment says, else the GPUs present, else the default.

    present: the compute capabilities of the GPUs in this machine; known: the machine code that nvcc makes (sm_80, ...).
    """
    own, torch_list = environment.get(OWN_VARIABLE, "").strip(), environment.get(TORCH_VARIABLE, "").strip()
    recent = sorted({capability for capability in present if capability >= OLDEST})
    if own:
        choice = Choice(parse(own), OWN_VARIABLE)
        if old := [str(arch) for arch in choice.archs if arch.capability < OLDEST]:
            raise ArchError(f"{OWN_VARIABLE}={own}: the kernels need 8.0 or newer, not {old[0]}")
    elif torch_list:
        # A list for other packages as well: what is too old for this one is passed over.
        archs = tuple(arch for arch in parse(torch_list, TORCH_VARIABLE) if arch.capability >= OLDEST)
        if not archs:
            remedy = f"set {OWN_VARIABLE}, for example to {DEFAULT}"
            raise ArchError(f"{TORCH_VARIABLE}={torch_list}: the kernels need 8.0 or newer; {remedy}")
        choice = Choice(archs, TORCH_VARIABLE)
    elif recent:
        found = _without_repeats(_nearest(capability, known) for capability in recent)
        choice = Choice(found, "the GPU in this machine" if len(recent) == 1 else "the GPUs in this machine")
    else:
        reason = "the GPU in this machine is older than 8.0" if present else "there is no GPU in this machine"
        choice = Choice(parse(DEFAULT), reason)
    unknown = [str(arch) for arch in choice.archs if not _is_known(arch, known)]
    if unknown:
        possible = ", ".join(sorted(known, key=lambda name: (len(name), name)))
        raise ArchError(f"{choice.reason}: this nvcc makes no code for {', '.join(unknown)}; it knows {possible}")
    return choice


def _nearest(capability: tuple[int, int], known: Collection[str]) -> Arch:
    """For a GPU that is present. One that is newer than nvcc gets the newest intermediate code that nvcc makes."""
    if _is_known(Arch(*capability), known):
        return Arch(*capability)
    versions = (re.fullmatch(r"sm_(\d+)(\d)", name) for name in known)
    older = [(int(match[1]), int(match[2])) for match in versions if match]
    return Arch(*max((version for version in older if OLDEST <= version < capability), default=OLDEST), ptx=True)


def _is_known(arch: Arch, known: Collection[str]) -> bool:
    """nvcc lists its targets without the suffix a."""
    return arch.machine_code.removesuffix("a") in known


def code_names(archs: Sequence[Arch]) -> list[str]:
    """What a file that serves every GPU is compiled into: machine code for each, then intermediate code."""
    return [arch.machine_code for arch in archs] + [arch.intermediate_code for arch in archs if arch.ptx]


def code_for_source(source: Path, archs: Sequence[Arch]) -> list[str]:
    """What one source file is compiled into.

    A folder smXY holds kernels for compute capability X.Y and later, or, where its machine code has the suffix a, which
    stands for instructions of its own, for that one alone.
    """
    oldest = _oldest(source)
    if oldest.machine_code.endswith("a"):
        return [code for code in code_names(archs) if code == oldest.machine_code]
    return code_names([arch for arch in archs if arch.capability >= oldest.capability])


def front_end_of(source: Path) -> str:
    """The intermediate code that all machine code of a source file is made from.

    That of the oldest GPU it is for: the source does not tell newer ones apart, and one pass of the front end, which is
    half of the compiler's work, then serves them all.
    """
    return _oldest(source).machine_code.replace("sm_", "compute_")


def _oldest(source: Path) -> Arch:
    folder = re.fullmatch(r"sm(\d+)(\d)", source.parent.name)
    return Arch(int(folder[1]), int(folder[2])) if folder else Arch(*OLDEST)


def gencode_flags(codes: Iterable[str], front_end: str) -> list[str]:
    """nvcc's arguments for them: machine code from the intermediate code of front_end."""
    return [f"-gencode=arch={front_end if code.startswith('sm_') else code},code={code}" for code in codes]
