"""Object files of the kernels: which there are, when one is compiled anew, errors of the compiler."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))

from build_tools import cuda_archs, cuda_objects
from build_tools.cuda_archs import Arch, parse

ROOT = Path(__file__).resolve().parent.parent


def test_object_files():
    sources = [Path("sm80/fwd.cu"), Path("sm90/fwd.cu"), Path("backends.cpp")]
    found = cuda_objects.objects(parse("8.0;9.0a"), sources)
    assert len({each.name for each in found}) == len(found) == 2 * 2 * 5 + 1
    assert {each.codes for each in found if each.source == sources[0]} == {("sm_80", "sm_90a")}
    assert {each.codes for each in found if each.source == sources[1]} == {("sm_90a",)}
    flags = next(each for each in found if each.name == "fwd_sm90_fp16_128").flags()
    assert {"-DFA_ELEMENT=fp16", "-DFA_HEAD_DIM=128", "-gencode=arch=compute_90a,code=sm_90a"} <= set(flags)
    assert {each.source for each in cuda_objects.objects((Arch(8, 0),), sources)} == {sources[0], sources[2]}


@pytest.mark.parametrize(
    ("archs", "macro", "code"),
    [
        ("8.0", [], 80),
        ("8.0+PTX", [], 80),
        ("8.6;12.0", [], 86),
        ("8.0;9.0a", ["-DFLASH_ATTN_HOPPER"], 80),
        ("9.0", ["-DFLASH_ATTN_HOPPER"], "90a"),
        (cuda_archs.DEFAULT, ["-DFLASH_ATTN_HOPPER"], 80),
    ],
)
def test_kernels_for_hopper_are_chosen_where_there_are_any(archs, macro, code, tmp_path):
    sources = [Path("sm80/fwd.cu"), Path("sm90/fwd.cu"), Path("backends.cpp")]
    found = cuda_objects.objects(parse(archs), sources)
    (chooser,) = (each for each in found if each.source == sources[2])
    flags = ["-x=cu", *macro, f"-gencode=arch=compute_{code},code=sm_{code}"]
    assert (chooser.name, chooser.flags()) == ("backends", flags)
    assert {each.macros for each in found if each is not chooser} == {()}
    assert bool(macro) == any(each.source == sources[1] for each in found)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(FAKE_NVCC)
    nvcc.chmod(0o755)
    text = cuda_objects.ninja_text(str(nvcc), found, tmp_path)
    assert text.count("FLASH_ATTN_HOPPER") == len(macro)
    assert ("fwd_sm90" in text) == bool(macro)


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
    log = json.loads((toolkit.built / "one_sm80_bf16_64.json").read_text())
    assert log["cpu_seconds"] >= 0
    assert log["peak_bytes"] > 0
    assert "Used 24 registers" in log["output"]
    assert {"-DFA_HEAD_DIM=64", "-std=c++20", "--compress-mode=size"} < set(log["command"])


def test_object_files_from_elsewhere_are_taken_as_they_are(tmp_path, capfd):
    """Their times, and where they lie, say nothing; what they were compiled from does."""
    first = Toolkit(tmp_path / "here")
    assert len(first.build()) == 2
    there = Toolkit(tmp_path / "there")
    shutil.copytree(first.built, there.built)
    for path in there.built.glob("*.o"):
        os.utime(path, (0, 0))
    assert there.build() == []
    assert "are those of this code" in capfd.readouterr().out
    assert there.build("8.6") == ["one_sm80_bf16_64.o", "two_sm80_bf16_64.o"]
    said = capfd.readouterr().out
    assert re.search(r"one_sm80_bf16_64 has changed: .*code=sm_80.* before, .*code=sm_86.* now", said), said
    (there.sources / "common.h").write_text("other text")
    assert len(there.build("8.6")) == 2
    assert "compiling kernels: sources has changed: " in capfd.readouterr().out
    nvcc = there.home / "bin" / "nvcc"
    nvcc.write_text(FAKE_NVCC.replace("13.0", "13.1"))
    assert len(there.build("8.6")) == 2
    assert "nvcc has changed: 13.0 before, 13.1 now" in capfd.readouterr().out
    (there.built / "one_sm80_bf16_64.o").unlink()
    assert there.build("8.6") == ["one_sm80_bf16_64.o"]
    assert "one_sm80_bf16_64.o is missing" in capfd.readouterr().out


def test_a_build_that_ends_halfway_is_not_taken_for_what_was_before(tmp_path):
    toolkit = Toolkit(tmp_path)
    toolkit.build()
    (toolkit.sources / "two_sm80.cu").write_text("broken")
    with pytest.raises(cuda_objects.ToolError):
        toolkit.build()
    (toolkit.sources / "two_sm80.cu").write_text("text")
    assert not (toolkit.built / "compiled_from.json").exists()
    assert toolkit.build() == ["two_sm80_bf16_64.o"]


def test_an_error_of_the_compiler_ends_the_build(tmp_path, capfd):
    toolkit = Toolkit(tmp_path)
    (toolkit.sources / "two_sm80.cu").write_text("broken")
    with pytest.raises(cuda_objects.ToolError, match="compiling the CUDA kernels failed"):
        toolkit.build()
    assert "two_sm80.cu: broken" in capfd.readouterr().out


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
