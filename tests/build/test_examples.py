"""What the README and the examples show works as shown."""

import os
import re
import subprocess
import sys

import pytest

from paths import ROOT

PNG = b"\x89PNG\r\n\x1a\n"


def python_blocks(page):
    """(first line, code) of each Python block of a page."""
    text = page.read_text()
    return [
        (text[: m.start(1)].count("\n") + 1, m[1]) for m in re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S)
    ]


def run_in_order(page):
    """The blocks of a page as a reader would type them, one after the other. Returns the names that they leave."""
    namespace = {"__name__": page.stem}
    for line, code in python_blocks(page):
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)
    return namespace


def test_readme_blocks_run_in_order():
    shown = "\n".join(code for _, code in python_blocks(ROOT / "README.md"))
    assert "flash_attn_func(" in shown
    assert "FlashMHA(" in shown
    names = run_in_order(ROOT / "README.md")
    assert names["out"].shape == names["x"].shape


PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if python_blocks(page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_docs_run_in_order(page):
    run_in_order(page)


def test_semantics_shows_something_that_runs():
    assert ROOT / "docs" / "semantics.md" in PAGES


def losses_of(summary):
    """(step, ours, plain) of each evaluation, from the table of losses."""
    rows = re.findall(r"^\| *(\d+) *\| *([\d.]+) *\| *([\d.]+) *\|", summary, re.M)
    return [(int(step), float(ours), float(plain)) for step, ours, plain in rows]


def test_train_gpt(tmp_path):
    """The demo in its small form: both implementations of attention learn the same, and the figures are written."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "examples/train_gpt.py", "--quick", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = (tmp_path / "summary.md").read_text()
    losses = losses_of(summary.split("attention alone")[0])
    assert len(losses) >= 4
    assert [step for step, *_ in losses] == sorted({step for step, *_ in losses})
    assert all(abs(ours - plain) <= 1e-3 for _, ours, plain in losses), losses
    assert losses[-1][1] < losses[0][1] - 0.5, "it learns"
    assert all(f"{ours:.6f}" in result.stdout for _, ours, _ in losses), "what is shown is what is saved"
    for name in ("loss_curves.png", "attention_scaling.png"):
        picture = (tmp_path / name).read_bytes()
        assert picture.startswith(PNG)
        assert len(picture) > 10_000
