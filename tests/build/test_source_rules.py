"""The rules of tests/rules hold in the whole tree, and each of them catches what it is there for."""

from collections import Counter

import pytest

from paths import ROOT
from rules.source import Rule, Source
from rules.table import RULES

FOLDERS = ("build_tools", "csrc", "flash_attn", "simulator", "tests", "tools", "examples", "benchmarks")
SUFFIXES = {suffix for rule in RULES for suffix in rule.suffixes}


def sources():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    files += ROOT.iterdir()
    return [
        Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(files)
        if path.suffix in SUFFIXES and path.is_file()
    ]


SOURCES = sources()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rule_holds(rule: Rule):
    violations = [violation for source in SOURCES for violation in rule.violations(source)]
    assert not violations, "\n" + "\n".join(violations)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rule_catches_its_bad_sample(rule: Rule):
    assert rule.violations(rule.bad)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rule_looks_at_some_file(rule: Rule):
    assert any(rule.covers(source) for source in SOURCES)


def test_files_of_tests_have_names_of_their_own():
    """Folders of tests are no packages: two modules of one name shadow each other, in processes above all."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert not [name for name, count in names.items() if count > 1 and name != "__init__.py"]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("csrc/cuda/ptx/sync.h", "inline void sync_threads() { __syncthreads(); }\n"),
        ("csrc/cuda/launch.h", "kernel<<<grid, block, smem, stream>>>(params);\n"),
        ("csrc/ops/cpu.cpp", '#include <ATen/core/Tensor.h>\n#include "cpu/backend.h"\nat::Tensor out;\n'),
        ("csrc/cpu/fwd.h", '#include "policy/mask.h"\n#include "cpu/tile.h"\n#include "problem.h"\n'),
        (
            "csrc/cuda/sm80/fwd.h",
            '#include "policy/mask.h"\n#include "cuda/attention/softmax.h"\n#include "cuda/ptx/mma.h"\n',
        ),
        (
            "csrc/policy/mask.h",
            "// No __syncthreads() or torch:: in it; begin may be > end;\nint x;  // [rows]\n",
        ),
        ("csrc/policy/mask.h", 'const char* kText = "asm // at:: <<<";\n'),
        ("csrc/problem.h", "int x;  // 0: off\n}  // namespace flash_attn\n"),
        (
            "flash_attn/autograd.py",
            "# dq, dk: gradients of q and k\n# rowsum(dout * out)\nx = f(num_heads_kv=2)\n",
        ),
        (
            "flash_attn/modules/mha.py",
            "from ..flash_attn_interface import x\nfrom flash_attn import layers\n",
        ),
    ],
)
def test_good_samples_pass(path: str, text: str):
    source = Source(path, text)
    assert not [violation for rule in RULES for violation in rule.violations(source)]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("csrc/policy/mask.h", '#include "cuda/attention/softmax.h"\n'),
        ("csrc/cuda/attention/softmax.h", '#include "cuda/sm80/fwd.h"\n'),
        ("csrc/problem.h", '#include "policy/mask.h"\n'),
        ("csrc/ops/cpu.cpp", '#include "cpu/fwd.h"\n'),
        ("csrc/ops/cpu.cpp", '#include "cuda/sm80/fwd.h"\n'),
        ("csrc/cuda/tile/gemm.h", '#include "policy/mask.h"\n'),
        ("csrc/cpu/fwd.h", '#include "../params.h"\n'),
        ("csrc/misc/x.h", "int x;\n"),
        ("csrc/cpu/fwd.h", "/* before\n   if (x) {\n*/\nint x;\n"),
        ("csrc/cpu/fwd.h", "int x;  // return x;\n"),
        ("flash_attn/autograd.py", "from . import modules\n"),
        ("flash_attn/layers/rotary.py", "from ..modules.mha import MHA\n"),
        ("flash_attn/cache.py", "x = 1\n"),
        ("setup.py", "# if x:\nimport os\n"),
    ],
)
def test_bad_samples_do_not_pass(path: str, text: str):
    source = Source(path, text)
    assert [violation for rule in RULES for violation in rule.violations(source)]
