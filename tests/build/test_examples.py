"""What the README and the examples show works as shown."""

import importlib
import os
import re
import subprocess
import sys

import pytest
import torch

from gpt import checkpoint
from gpt.generation import gap, sampler, with_cache, without_cache
from gpt.model import GPT, GPTConfig
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


@pytest.mark.whole
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
        check_picture(tmp_path / name)
    result = generate_text("--quick", "--out", str(tmp_path), "--num-bytes", "20")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "training" not in result.stdout, "it takes the model of the demo"


def check_picture(path):
    picture = path.read_bytes()
    assert picture.startswith(PNG)
    assert len(picture) > 10_000


# Generation.


def small_gpt(attention="flash"):
    model = GPT(GPTConfig(context=40, width=32, num_layers=2, num_heads=2), attention, seed=3).eval()
    model.head.weight.data *= 50  # as decided as a trained model
    return model


@pytest.fixture
def generate():
    for name in ("matplotlib", "tqdm"):
        pytest.importorskip(name)
    return importlib.import_module("generate")


def generate_text(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "examples/generate.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("attention", ["flash", "plain"])
@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, None), (1.0, None), (1.0, 5)])
def test_a_cache_does_not_change_the_text(attention, temperature, top_k):
    model, prompt = small_gpt(attention), b"def f"
    cached, whole = (
        bytes(way(model, prompt, 35, sampler(temperature, seed=1, top_k=top_k))) for way in (with_cache, without_cache)
    )
    assert cached == whole
    assert len(set(cached)) > 2
    assert gap(model, prompt + cached, prompt + whole) == 0.0


@torch.no_grad()
def test_logits_are_those_of_the_whole_text():
    model = small_gpt()
    text = torch.randint(256, (2, 40))
    expected, cache = model(text), model.new_cache(40, batch_size=2)
    parts = [model(text[:, start:end], cache, start) for start, end in ((0, 7), (7, 8), (8, 20), (20, 40))]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected)


def test_random_bytes_are_among_the_likeliest():
    logits = torch.arange(256.0) / 100
    choose = sampler(1.0, seed=0, top_k=3)
    assert {choose(logits) for _ in range(100)} == {253, 254, 255}
    assert sampler(0.0, seed=0)(logits) == 255
    assert len({sampler(1.0, seed)(logits) for seed in range(20)}) > 10


def test_texts_that_part_by_rounding_are_told_from_others():
    model, text = small_gpt().requires_grad_(False), b"import os"
    logits = model(torch.tensor([list(text)]))[0, -1]
    first, second = logits.topk(2).indices.tolist()
    found = gap(model, text + bytes([first, 0]), text + bytes([second, 1]))
    assert found == pytest.approx(float(logits[first] - logits[second]), rel=1e-5)


def test_text_is_shown_as_it_comes(generate, capsys):
    text, seen = "né".encode(), []
    show = generate.printer()

    def stream():
        for byte in text:
            yield byte
            seen.append(capsys.readouterr().out)

    assert generate.run(stream(), torch.device("cpu"), show).text == text
    assert seen == ["n", "", "é"]


def test_a_checkpoint_gives_the_same_model(tmp_path):
    model, text = small_gpt("plain"), torch.arange(40)[None]
    checkpoint.save(model, tmp_path / "new" / "gpt.pt")
    loaded = checkpoint.load(tmp_path / "new" / "gpt.pt", torch.device("cpu"))
    assert loaded.config == model.config
    torch.testing.assert_close(loaded(text), model(text))


@pytest.mark.whole
def test_generate(tmp_path):
    """It trains where there is no model, and shows what it saves."""
    result = generate_text("--quick", f"--out={tmp_path}", "--train-steps=10", "--prompt=class é", "--top-k=1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "10 steps of training come first" in result.stdout
    assert "\nclass é" in result.stdout
    assert f"Both wrote the same {256 - len('class é'.encode())} bytes." in result.stdout
    summary = (tmp_path / "generation.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \|.*$", summary, re.M)
    assert [int(context) for context, *_ in rows] == [128, 256]
    assert all(f"| {milliseconds} |" in result.stdout for _, *both in rows for milliseconds in both)
    check_picture(tmp_path / "generation.png")


WRONG_ARGUMENTS = [
    (["--prompt="], "--prompt: expected some text, got ''"),
    (["--num-bytes=0"], "--num-bytes: expected at least 1, got 0"),
    (["--temperature=-1"], "--temperature: expected at least 0, got -1.0"),
    (["--temperature=nan"], "--temperature: expected at least 0, got nan"),
    (["--top-k=0"], "--top-k: expected from 1 to 256, got 0"),
    (["--train-steps=0"], "--train-steps: expected at least 1, got 0"),
    (["--checkpoint={folder}/none.pt"], "none.pt: expected a model that train_gpt.py saved, got FileNotFoundError"),
    (["--checkpoint={folder}/text.pt"], "text.pt: expected a model that train_gpt.py saved, got "),
    (["--checkpoint={folder}/gpt.pt", "--num-bytes=40"], "expected at most 40 bytes together, the context, got 9 + 40"),
    (["--checkpoint={folder}/gpt.pt", f"--prompt={'x' * 40}"], "--prompt, --num-bytes: expected at most 40 bytes"),
]


@pytest.mark.parametrize(("arguments", "text"), WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(arguments, text, generate, tmp_path, monkeypatch, capsys):
    checkpoint.save(small_gpt(), tmp_path / "gpt.pt")
    (tmp_path / "text.pt").write_text("not a model")
    chosen = [argument.format(folder=tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["generate.py", "--device=cpu", f"--out={tmp_path}", *chosen])
    with pytest.raises(SystemExit) as caught:
        generate.main()
    assert caught.value.code not in (0, None)
    assert text in capsys.readouterr().err + str(caught.value)
