"""Generate text with the GPT of train_gpt.py, with a cache of keys and values and without.

With the cache, flash_attn_with_kvcache appends the keys and values of each new byte and attends to those of all bytes
so far; without it, every byte takes a forward pass over the whole text. The example checks that both write the same
text, prints the speed of either, and measures time and memory of the next byte against the length of the text. A figure
and a summary are written to --out. The model is the checkpoint that train_gpt.py saves; where there is none, a small
training run comes first.

    python examples/generate.py                                   # the likeliest byte each time
    python examples/generate.py --temperature 0.8 --top-k 40      # random ones
    python examples/generate.py --prompt 'class ' --num-bytes 100 --quick
"""

from __future__ import annotations

import argparse
import codecs
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt import checkpoint
from gpt.data import Corpus
from gpt.generation import gap, sampler, with_cache, without_cache
from gpt.generation_cost import markdown_table, sweep
from gpt.machine import choose_device, describe_machine
from gpt.model import GPT, GPTConfig
from gpt.plots import plot_generation
from gpt.train import TrainConfig, mixed_precision, train

OUTPUT = Path(__file__).parent / "output"
TIE = {"cpu": 1e-3, "cuda": 5e-2}  # logits as close as that are in the order that rounding decides


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="def read_", help="text to continue")
    parser.add_argument("--num-bytes", type=int, help="bytes to generate (as many as the context of the model allows)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest byte; above: random ones")
    parser.add_argument("--top-k", type=int, help="choose among the k likeliest bytes only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="a model that train_gpt.py saved (gpt.pt in --out)")
    parser.add_argument("--train-steps", type=int, default=300, help="of the training run where there is no checkpoint")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="folder for the figure")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--quick", action="store_true", help="measure short texts only")
    arguments = parser.parse_args()
    wrong = [
        ("--prompt", "some text", arguments.prompt, arguments.prompt != ""),
        ("--num-bytes", "at least 1", arguments.num_bytes, arguments.num_bytes is None or arguments.num_bytes >= 1),
        ("--temperature", "at least 0", arguments.temperature, 0 <= arguments.temperature < float("inf")),
        ("--top-k", "from 1 to 256", arguments.top_k, arguments.top_k is None or 1 <= arguments.top_k <= 256),
        ("--train-steps", "at least 1", arguments.train_steps, arguments.train_steps >= 1),
    ]
    for name, expected, got, is_right in wrong:
        if not is_right:
            parser.error(f"{name}: expected {expected}, got {got!r}")
    return arguments


def load_or_train(arguments: argparse.Namespace, device: torch.device) -> GPT:
    """The model of the checkpoint. One that is not given and not there is made first."""
    path = arguments.checkpoint or arguments.out / "gpt.pt"
    if arguments.checkpoint is None and not path.exists():
        steps = arguments.train_steps
        print(f"no model in {path} yet: {steps} steps of training come first (train_gpt.py trains longer)")
        config = TrainConfig(steps=steps, warmup_steps=min(50, steps // 8), eval_every=steps, eval_windows=16)
        model, _ = train(Corpus.from_standard_library(), GPTConfig(), config, "flash", device)
        checkpoint.save(model, path)
    try:
        return checkpoint.load(path, device).eval()
    except ValueError as error:
        raise SystemExit(f"--checkpoint: {error}") from error


@dataclass
class Run:
    """A text that was generated, and how long that took."""

    text: bytes
    seconds: float

    @property
    def speed(self) -> str:
        """Bytes per second; a token is a byte."""
        return f"{len(self.text) / self.seconds:,.0f} bytes per second"


def run(stream: Iterator[int], device: torch.device, show: Callable[[int], None]) -> Run:
    """Take all bytes from the stream, and show each as it comes."""
    text, started = bytearray(), time.perf_counter()
    with mixed_precision(device):
        for byte in stream:
            text.append(byte)
            show(byte)
    return Run(bytes(text), time.perf_counter() - started)


def printer() -> Callable[[int], None]:
    """Prints bytes as soon as they make a character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    return lambda byte: print(decoder.decode(bytes([byte])), end="", flush=True)


def generate(model: GPT, arguments: argparse.Namespace, device: torch.device) -> tuple[bool, str]:
    """Whether both ways write the same text, and what they took."""
    prompt, room = arguments.prompt.encode(), model.config.context
    num_bytes = arguments.num_bytes or room - len(prompt)
    if not 0 < num_bytes <= room - len(prompt):
        got = f"{len(prompt)} + {num_bytes}"
        raise SystemExit(f"--prompt, --num-bytes: expected at most {room} bytes together, the context, got {got}")

    def stream(generator: Callable[..., Iterator[int]]) -> Iterator[int]:
        return generator(model, prompt, num_bytes, sampler(arguments.temperature, arguments.seed, arguments.top_k))

    print(f"\n{arguments.prompt}", end="", flush=True)
    cached = run(stream(with_cache), device, printer())
    print("\n")
    whole = run(stream(without_cache), device, lambda byte: None)
    with mixed_precision(device):
        megabytes = model.new_cache(len(prompt) + num_bytes).nbytes / 1e6
        difference = gap(model, prompt + cached.text, prompt + whole.text)
    same = cached.text == whole.text
    verdict = f"Both wrote the same {num_bytes} bytes."
    if not same:
        verdict = f"The texts differ: they part where the logits of two bytes are {difference:.1e} apart."
    lines = [f"with a cache of {megabytes:.1f} MB: {cached.speed}", f"without: {whole.speed}", verdict]
    return same or difference <= TIE[device.type] or arguments.temperature > 0, "\n".join(lines)


def main() -> int:
    """Generate, compare, measure; returns 0 if both texts are the same, else 1."""
    arguments = parse_arguments()
    device = choose_device(arguments.device)
    print(f"machine: {describe_machine(device)}")
    model = load_or_train(arguments, device)
    same, comparison = generate(model, arguments, device)
    print(comparison)

    contexts = (128, 256) if arguments.quick else (256, 512, 1024, 2048, 4096, 8192)
    points = sweep(model.config, contexts, device.type, seconds=0.1 if arguments.quick else 1.0)
    table = "The next byte, by bytes of text so far:\n\n" + markdown_table(points)
    print(f"\n{table}\n")
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot_generation(points, arguments.out / "generation.png")
    (arguments.out / "generation.md").write_text(f"{describe_machine(device)}\n\n{comparison}\n\n{table}\n")
    print(f"generation.png and generation.md are in {arguments.out}.")
    if not same:
        print("The text depends on whether there is a cache.", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
