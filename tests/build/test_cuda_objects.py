"""Object files of the kernels: which there are, when one is compiled anew, errors of the compiler."""

from pathlib import Path

import pytest

from build_tools import cuda_archs, cuda_objects
from build_tools.cuda_archs import Arch, parse
from paths import ROOT

KERNELS = cuda_objects.SOURCES
SOURCES = [KERNELS / "sm80" / "fwd.cu", KERNELS / "sm90" / "fwd.cu", KERNELS / "backends.cpp"]
BACKENDS = [KERNELS / "sm80" / "backend.cpp", KERNELS / "sm90" / "backend.cpp"]


def test_object_files():
    found = cuda_objects.objects(parse("8.0;9.0a"), SOURCES)
    dims = [cuda_objects.head_dims(source.parent) for source in SOURCES[:2]]
    assert len({each.name for each in found}) == len(found) == 2 * len([*dims[0], *dims[1]]) + 1
    assert {each.codes for each in found if each.source == SOURCES[0]} == {("sm_80", "sm_90a")}
    assert {each.codes for each in found if each.source == SOURCES[1]} == {("sm_90a",)}
    flags = next(each for each in found if each.name == "fwd_sm90_fp16_128").flags()
    assert {"-DFA_ELEMENT=fp16", "-DFA_HEAD_DIM=128", "-gencode=arch=compute_90a,code=sm_90a"} <= set(flags)
    assert next(each for each in found if each.name == "backends").flags() == []
    assert {each.source for each in cuda_objects.objects((Arch(8, 0),), SOURCES)} == {SOURCES[0], SOURCES[2]}


def test_kernels_for_every_problem_are_compiled_once():
    """Those of a folder without a list of head_dims."""
    each = cuda_objects.objects(parse(cuda_archs.DEFAULT), [KERNELS / "attention" / "range_blocks.cu"])
    assert [(one.name, one.element, one.head_dim) for one in each] == [("range_blocks", "", 0)]
    assert each[0].flags() == cuda_archs.gencode_flags(["sm_80", "sm_90a", "compute_80"], "compute_80")


def test_each_architecture_has_its_list_of_head_dims(tmp_path):
    folder = tmp_path / "sm89"
    folder.mkdir()
    (folder / "head_dims.inl").write_text("// For 8.9.\n64,\n96 // not 128\n")
    assert cuda_objects.head_dims(folder) == (64, 96)
    found = cuda_objects.objects(parse("8.0+PTX;8.9;12.0+PTX"), [folder / "fwd.cu"])
    assert {each.head_dim for each in found} == {64, 96}
    assert {each.codes for each in found} == {("sm_89", "sm_120", "compute_120")}


@pytest.mark.parametrize(
    ("archs", "generic", "hopper"),
    [
        ("8.0", "sm_80", ""),
        ("8.6;12.0+PTX", "sm_86 sm_120 compute_120", ""),
        ("9.0", "sm_90a", "sm_90a"),
        (cuda_archs.DEFAULT, "sm_80 sm_90a compute_80", "sm_90a"),
    ],
)
def test_a_backend_is_told_what_its_kernels_are_compiled_into(archs, generic, hopper, tmp_path):
    """Nothing, if they are left out: then it must not ask for them."""
    found = cuda_objects.objects(parse(archs), [*SOURCES, *BACKENDS])
    flags = {each.name: each.flags() for each in found if not each.element}
    assert flags["backend_sm80"] == [f'-DFLASH_ATTN_BACKEND_CODE="{generic}"']
    assert flags["backend_sm90"] == [f'-DFLASH_ATTN_BACKEND_CODE="{hopper}"']
    assert bool(hopper) == any(each.kernel == "fwd_sm90" for each in found)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(FAKE_NVCC)
    nvcc.chmod(0o755)
    assert f"""'-DFLASH_ATTN_BACKEND_CODE="{generic}"'""" in cuda_objects.ninja_text(str(nvcc), found, tmp_path)


def test_every_cuda_source_of_the_tree_is_built():
    built = {each.source for each in cuda_objects.objects(parse(cuda_archs.DEFAULT))}
    assert {source for source in built if source.suffix == ".cu"} == set((ROOT / "csrc").rglob("*.cu"))


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_bad_max_jobs(text, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", text)
    with pytest.raises(cuda_objects.ToolError, match=f"MAX_JOBS={text}: expected a number of at least 1"):
        cuda_objects.jobs()


def test_max_jobs(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert cuda_objects.jobs() == 3
    monkeypatch.delenv("MAX_JOBS")
    assert cuda_objects.jobs() >= 1


FAKE_NVCC = """#!/bin/sh
# Stands in for nvcc: "compiles" by copying, says what ptxas says, and notes that it ran.
[ "$1" = --version ] && { echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; }
for argument; do
    case "$last" in -MF) depfile=$argument ;; -c) source=$argument ;; -o) object=$argument ;; esac
    last=$argument
done
grep -q broken "$source" && { echo "$source: broken" >&2; exit 2; }
cp "$source" "$object"
echo "$object: $source ${source%/*}/common.h" >"$depfile"
echo "${object##*/}" >>"${0%/*}/ran"
echo "$@" >"${0%/*}/arguments"
echo "ptxas info    : Used 24 registers, used 1 barriers" >&2
grep -q serialised "$source" && echo "ptxas info    : (C7510) Potential Performance Loss" >&2
echo "odd.cu(1): warning #1: odd" >&2
"""


class Toolkit:
    """A folder that looks like a CUDA toolkit, and sources to compile with it."""

    def __init__(self, folder: Path):
        self.home, self.sources, self.built = folder / "home of $cuda", folder / "sources", folder / "built"
        (self.home / "bin").mkdir(parents=True)
        self.sources.mkdir()
        nvcc = self.home / "bin" / "nvcc"
        nvcc.write_text(FAKE_NVCC)
        nvcc.chmod(0o755)
        for name in ("one_sm80.cu", "two_sm80.cu", "common.h"):
            (self.sources / name).write_text("text")
        (self.sources / "head_dims.inl").write_text("64, 96")

    def build(self, archs="8.0"):
        """What the compiler was run for."""
        ran = self.home / "bin" / "ran"
        ran.unlink(missing_ok=True)
        wanted = [
            each
            for each in cuda_objects.objects(parse(archs), cuda_objects.cuda_sources(self.sources))
            if each.head_dim == 64 and each.element == "bf16"
        ]
        found = cuda_objects.build(self.home, wanted, self.built)
        assert all(path.exists() for path in found)
        return sorted(ran.read_text().split()) if ran.exists() else []


def test_only_what_changed_is_compiled_again(tmp_path, capfd):
    toolkit = Toolkit(tmp_path)
    both = ["one_sm80_bf16_64.o", "two_sm80_bf16_64.o"]
    assert toolkit.build() == both
    assert toolkit.build() == []
    (toolkit.sources / "two_sm80.cu").write_text("other text")
    assert toolkit.build() == both[1:]
    (toolkit.sources / "common.h").write_text("other text")
    assert toolkit.build() == both
    assert toolkit.build("8.0;9.0") == both
    assert toolkit.build("8.0;9.0") == []
    out, _ = capfd.readouterr()
    assert "odd.cu(1): warning #1: odd" in out
    assert "registers" not in out
    assert "Used 24 registers" in (toolkit.built / "one_sm80_bf16_64.log").read_text()
    arguments = (toolkit.home / "bin" / "arguments").read_text().split()
    assert {"-DFA_HEAD_DIM=64", "-std=c++20", "--compress-mode=size"} < set(arguments)


def test_an_error_of_the_compiler_ends_the_build(tmp_path, capfd):
    """What was compiled before is not taken for what is there then."""
    toolkit = Toolkit(tmp_path)
    toolkit.build()
    (toolkit.sources / "two_sm80.cu").write_text("broken")
    with pytest.raises(cuda_objects.ToolError, match="compiling the CUDA kernels failed"):
        toolkit.build()
    assert "two_sm80.cu: broken" in capfd.readouterr().out
    (toolkit.sources / "two_sm80.cu").write_text("text")
    assert toolkit.build() == ["two_sm80_bf16_64.o"]


def test_products_that_wait_for_one_another_are_an_error(tmp_path, capfd):
    """And remain one when the build is tried again."""
    toolkit = Toolkit(tmp_path)
    (toolkit.sources / "two_sm80.cu").write_text("serialised")
    for _ in range(2):
        with pytest.raises(cuda_objects.ToolError, match="compiling the CUDA kernels failed"):
            toolkit.build()
        out = capfd.readouterr().out
        assert "(C7510)" in out
        assert "error: this compiler makes a slow kernel of that (C75xx)" in out
    assert not (toolkit.built / "two_sm80_bf16_64.o").exists()
    (toolkit.sources / "two_sm80.cu").write_text("text")
    assert "two_sm80_bf16_64.o" in toolkit.build()


def test_toolkit_without_a_compiler(tmp_path):
    with pytest.raises(cuda_objects.ToolError, match=r"no nvcc there; set CUDA_HOME"):
        cuda_objects.nvcc_of(tmp_path)
