"""Which backend runs a problem, why not a better one, and FLASH_ATTN_BACKEND, as far as that needs no GPU."""

import ctypes
import os
import subprocess
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import flash_attn
from paths import ROOT

CODE = {"sm80": "sm_80 compute_80", "sm90": "sm_90a"}


class Backends:
    """The choice among backends, compiled with g++, with kernels for some architectures, which do nothing."""

    compiled: ClassVar[dict[tuple[str, ...], Path]] = {}  # object files, by name and flags

    def __init__(self, folder: Path, *built: str):
        compiler = [os.environ.get("CXX", "g++"), "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fPIC"]
        compiler += ["-fvisibility=hidden", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/kernels'}"]
        sources = {"test": (Path(__file__).with_name("backends.cpp"), [])}
        sources["choice"] = (ROOT / "csrc/cuda/backends.cpp", [])
        for arch in ("sm80", "sm90"):
            code = [f'-DFLASH_ATTN_BACKEND_CODE="{CODE[arch]}"'] if arch in built else []
            sources[arch] = (ROOT / f"csrc/cuda/{arch}/backend.cpp", code)
        for arch in built:
            instances = [f"-DFA_ARCH={arch[2:]}", f'-DFA_HEAD_DIMS="cuda/{arch}/head_dims.inl"']
            sources[f"kernels_{arch}"] = (ROOT / "tests/kernels/runner/missing.cpp", instances)
        objects = []
        for name, (source, flags) in sources.items():
            path = self.compiled.setdefault((name, *flags), folder / f"{name}.o")
            if not path.exists():
                subprocess.run([*compiler, *flags, "-c", source, "-o", path], check=True)
            objects.append(path)
        library = folder / "libbackends.so"
        subprocess.run([*compiler, "-shared", "-Wl,--no-undefined", *objects, "-o", library], check=True)
        self.library = ctypes.CDLL(str(library))
        self.library.workspace_bytes.restype = ctypes.c_int64
        self.library.estimated_time.restype = ctypes.c_double

    def text(self, function: str, *arguments: str) -> str:
        text = ctypes.create_string_buffer(2000)
        getattr(self.library, function)(*(each.encode() for each in arguments), text, ctypes.c_size_t(len(text)))
        return text.value.decode()

    def explain(self, changes: str = "", which: str = "fwd") -> tuple[str, dict[str, str]]:
        """The backend that runs it, and the reasons of better ones."""
        chosen, *reasons = self.text("explain", which, changes).splitlines()
        return chosen, dict(line.split(": ", 1) for line in reasons)

    def estimated_time(self, changes: str = "") -> float:
        return self.library.estimated_time(changes.encode())

    def workspace_bytes(self, which: str, changes: str = "") -> int:
        return self.library.workspace_bytes(which.encode(), changes.encode())


@pytest.fixture(scope="module")
def backends(tmp_path_factory):
    return Backends(tmp_path_factory.mktemp("backends"), "sm80", "sm90")


@pytest.fixture(scope="module")
def without_hopper(tmp_path_factory):
    return Backends(tmp_path_factory.mktemp("without_hopper"), "sm80")


@pytest.fixture(scope="module")
def without_any(tmp_path_factory):
    return Backends(tmp_path_factory.mktemp("without_any"))


def test_the_best_that_can(backends):
    assert backends.text("backends") == "sm90 sm_90a\nsm80 sm_80 compute_80\n"
    assert backends.explain() == ("sm90", {})
    assert backends.explain(which="bwd") == ("sm90", {})
    assert backends.explain(which="probs") == ("sm80", {"sm90": "it has no kernels for this pass"})


REASONS = [
    ("fwd", "compute_capability=80", "compute capability 8.0 is not 9.0"),
    ("fwd", "compute_capability=120", "compute capability 12.0 is not 9.0"),
    ("fwd", "paged=1", "keys and values are in pages (block_table)"),
    ("fwd", "q.row_stride=0", "TMA cannot read q: rows of 128 bytes overlap, 0 bytes apart"),
    ("fwd", "k.row_stride=32", "TMA cannot read k: rows of 128 bytes overlap, 64 bytes apart"),
    ("fwd", "v.data=1026", "TMA cannot read v: it does not start at a multiple of 16 bytes"),
    ("fwd", "head_dim=60", "TMA cannot read q: rows of 120 bytes do not end at a multiple of 16"),
    ("fwd", "head_dim_v=4", "TMA cannot read v: rows of 8 bytes do not end at a multiple of 16"),
    ("fwd", "q.row_stride=260", "TMA cannot read q: rows 520 bytes apart do not start at multiples of 16"),
    ("fwd", "q.head_stride=68", "TMA cannot read q: heads 136 bytes apart do not start at multiples of 16"),
    ("fwd", "q.batch_stride=68", "TMA cannot read q: sequences 136 bytes apart do not start at multiples of 16"),
    ("fwd", "out.row_stride=0", "TMA cannot write out: rows of 128 bytes overlap, 0 bytes apart"),
    ("fwd", "seqlen_k=0", "TMA cannot read k: it is empty"),
    ("fwd", "k.row_stride=8589934592", "TMA cannot read k: rows are 17179869184 bytes apart, which is too far"),
    (
        "fwd",
        "k.batch_stride=17179869192",
        "TMA cannot read k: it is too large: 34359789968 bytes in steps of 16 bytes",
    ),
    ("bwd", "dout.row_stride=0", "TMA cannot read dout: rows of 128 bytes overlap, 0 bytes apart"),
    ("bwd", "dk.data=1032", "TMA cannot write dk: it does not start at a multiple of 16 bytes"),
    ("bwd", "dv.row_stride=260", "TMA cannot write dv: rows 520 bytes apart do not start at multiples of 16"),
]


@pytest.mark.parametrize(("which", "changes", "reason"), REASONS, ids=[changes for _, changes, _ in REASONS])
def test_why_not_hopper(backends, which, changes, reason):
    assert backends.explain(changes, which) == ("sm80", {"sm90": reason})


PARTIAL = [(which, changes) for which, changes, reason in REASONS if reason.startswith("TMA cannot write")]


@pytest.mark.parametrize(("which", "changes"), PARTIAL, ids=[changes for _, changes in PARTIAL])
def test_hopper_writes_partial_results_without_tma(backends, which, changes):
    """Results in fp32 are stored from registers, wherever they are to be."""
    assert backends.explain(f"{changes} float_results=1", which) == ("sm90", {})


def test_time_depends_on_what_queries_see(backends):
    """The plan counts the key tiles of each query tile, from the places of both."""
    causal = "window_right=0 seqlen_k=1000"
    assert backends.estimated_time(causal) == backends.estimated_time(f"{causal} q_start=900")
    assert backends.estimated_time(f"{causal} q_start=1000") == backends.estimated_time("seqlen_k=1000")
    assert backends.estimated_time(f"{causal} q_start=450") < backends.estimated_time(causal)
    assert backends.estimated_time(f"{causal} q_start=50 k_start=500") < backends.estimated_time("seqlen_k=1")


@pytest.mark.parametrize(
    ("changes", "sm90", "sm80"),
    [
        ("type=0", *2 * ["elements are neither bfloat16 nor float16"]),
        ("head_dim=264", *2 * ["head_dim is 264, more than 256"]),
        ("compute_capability=75", "compute capability 7.5 is not 9.0", "compute capability 7.5 is older than 8.0"),
    ],
)
def test_what_none_can(backends, changes, sm90, sm80):
    assert backends.explain(changes) == ("", {"sm90": sm90, "sm80": sm80})
    assert backends.text("run_fwd", changes) == f"no backend can run this; sm90: {sm90}; sm80: {sm80}"
    assert backends.workspace_bytes("fwd", changes) == 0


def test_what_is_not_in_the_build(without_hopper, without_any):
    assert without_hopper.text("backends") == "sm90 \nsm80 sm_80 compute_80\n"
    assert without_hopper.explain() == ("sm80", {"sm90": "it is not in this build"})
    assert without_any.explain() == ("", dict.fromkeys(("sm90", "sm80"), "it is not in this build"))


def test_one_is_asked_for(backends, without_hopper):
    another = "FLASH_ATTN_BACKEND asks for another"
    assert backends.explain("backend=sm80") == ("sm80", {"sm90": another})
    assert backends.explain("backend=sm90") == ("sm90", {})
    refused = backends.explain("backend=sm90 paged=1")
    assert refused == ("", {"sm90": "keys and values are in pages (block_table)", "sm80": another})
    said = backends.text("run_fwd", "backend=sm90 paged=1")
    assert said == "FLASH_ATTN_BACKEND=sm90: keys and values are in pages (block_table)"
    said = without_hopper.text("run_fwd", "backend=sm90")
    assert said == "FLASH_ATTN_BACKEND=sm90: it is not in this build"


def test_every_head_dim_has_an_instance(backends):
    """The kernels of this library are none, and say so."""
    for backend in ("sm90", "sm80"):
        for head_dim in (8, 64, 72, 128, 136, 192, 200, 256):
            rows = "v.row_stride=1024 out.row_stride=1024"
            said = backends.text("run_fwd", f"backend={backend} head_dim=8 head_dim_v={head_dim} {rows}")
            assert said == "this build has no kernels for this element type and head_dim"


def test_workspaces(backends):
    """As the tables of shapes have them: dQ in fp32 in whole tiles, turns, and where rows are padded two numbers."""
    tiles, heads, dims = 2 * 1, 4, 64  # of 128 queries
    hopper = tiles * heads * (128 * dims * 4 + 2 * 128 * 4) + 32
    assert backends.workspace_bytes("bwd") == hopper
    tiles = 2 * 2  # of 64 queries
    generic = tiles * heads * (64 * dims * 4) + 64
    assert backends.workspace_bytes("bwd", "backend=sm80") == generic
    assert backends.workspace_bytes("bwd", "softcap=2") == tiles * heads * (64 * dims * 4 + 2 * 64 * 4) + 64
    assert backends.workspace_bytes("fwd") == 16
    assert backends.workspace_bytes("fwd", "window_right=0") == 16 + 8 * heads * tiles
    assert backends.workspace_bytes("fwd", "backend=sm80") == 0
    assert backends.workspace_bytes("probs") == 0


def test_workspaces_with_key_ranges(backends):
    """First the tables of the ranges, 16 bytes per 64 queries and 8 per 64 keys, in steps of 256 bytes."""
    for which in ("fwd", "probs", "bwd"):
        own = backends.workspace_bytes(which, "backend=sm80 softcap=2")
        assert backends.workspace_bytes(which, "backend=sm80 key_ranges=1") == own + 256
        assert backends.workspace_bytes(which, "backend=sm80 key_ranges=1 seqlen_k=3000") >= own + 1024
    masked = backends.workspace_bytes("fwd", "window_right=0")
    assert backends.workspace_bytes("fwd", "key_ranges=1") == masked + 256
    assert backends.text("run_fwd", "key_ranges=1") == "there are no kernels for key ranges"


# FLASH_ATTN_BACKEND on the CPU.


def attend():
    q = torch.ones(1, 4, 2, 8, requires_grad=True)
    return flash_attn.flash_attn_func(q, q, q)


@pytest.mark.parametrize("name", ["", "cpu"])
def test_the_cpu_is_asked_for(name, monkeypatch):
    monkeypatch.setenv("FLASH_ATTN_BACKEND", name)
    out = attend()
    assert torch.equal(out, torch.ones_like(out))
    out.sum().backward()


def test_unknown_backend(monkeypatch):
    """Asked at every call, also in the backward pass."""
    out = attend()
    monkeypatch.setenv("FLASH_ATTN_BACKEND", "sm75")
    said = "flash_attn: FLASH_ATTN_BACKEND=sm75: there is no such backend; there are sm90, sm80, cpu"
    with pytest.raises(RuntimeError, match=said):
        attend()
    with pytest.raises(RuntimeError, match=said):
        out.sum().backward()


@pytest.mark.parametrize("name", ["sm80", "sm90"])
def test_a_gpu_is_asked_for_and_tensors_are_on_the_cpu(name, monkeypatch):
    monkeypatch.setenv("FLASH_ATTN_BACKEND", name)
    said = f"FLASH_ATTN_BACKEND={name}: that backend takes tensors on a CUDA device, and these are on cpu; move them"
    with pytest.raises(RuntimeError, match=said):
        attend()
