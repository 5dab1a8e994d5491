"""Train a small byte-level GPT with FlashMHA on the source of Python's own standard library.

The demo trains the same model twice, with the same seed: with this package's FlashMHA, and with attention written out
in PyTorch. It checks that both runs give the same validation loss at every evaluation, shows a sample of what the
model writes, and then measures attention alone against sequence length. Figures and a summary go to --out.

    python examples/train_gpt.py            # three to four minutes on two cores
    python examples/train_gpt.py --quick    # under a minute, for a first look and for CI
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

import flash_attn
from gpt.attention_scaling import Point, markdown_table, sweep
from gpt.data import Corpus
from gpt.model import GPT, GPTConfig
from gpt.plots import plot_losses, plot_scaling
from gpt.train import History, TrainConfig, largest_difference, mixed_precision, train

PROMPT = b"def read_"
TOLERANCE = {"cpu": 1e-3, "cuda": 2e-2}  # float32 on a CPU; bfloat16 on a GPU


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    defaults, model = TrainConfig(), GPTConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller run: fewer steps, lengths only up to 1024")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output", help="folder for the figures")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=None, help=f"training steps of each run ({defaults.steps})")
    parser.add_argument("--batch-size", type=int, default=defaults.batch_size)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--context", type=int, default=model.context, help="bytes the model sees at once")
    parser.add_argument("--width", type=int, default=model.width)
    parser.add_argument("--layers", type=int, default=model.num_layers)
    parser.add_argument("--heads", type=int, default=model.num_heads)
    parser.add_argument("--sample-bytes", type=int, default=400, help="length of the generated sample")
    return parser.parse_args()


def choose_device(wanted: str) -> torch.device:
    """A GPU when there is one and this build of flash_attn has kernels for GPUs; otherwise the CPU."""
    has_kernels = bool(flash_attn.build_info()["cuda_archs"])
    usable = torch.cuda.is_available() and has_kernels
    if wanted == "cuda" and not usable:
        reason = "flash_attn was built without CUDA kernels" if torch.cuda.is_available() else "torch sees no GPU"
        raise SystemExit(f"--device cuda: {reason}")
    return torch.device("cuda" if usable and wanted != "cpu" else "cpu")


def train_config(arguments: argparse.Namespace) -> TrainConfig:
    """The training settings of the command line."""
    steps = arguments.steps or (60 if arguments.quick else TrainConfig.steps)
    return TrainConfig(
        steps=steps,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        learning_rate=arguments.learning_rate,
        warmup_steps=min(TrainConfig.warmup_steps, steps // 8),
        eval_every=max(1, min(TrainConfig.eval_every, steps // 4)),
        eval_windows=16 if arguments.quick else TrainConfig.eval_windows,
    )


def describe_machine(device: torch.device) -> str:
    """Where and in which precision the demo runs."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, bfloat16"
    instruction_set = flash_attn.build_info()["cpu_instruction_set"]
    return f"CPU, {instruction_set}, {torch.get_num_threads()} threads, float32"


def print_sample(model: GPT, num_bytes: int, seed: int, device: torch.device) -> None:
    """Let the trained model write some Python."""
    with mixed_precision(device):
        text = PROMPT + model.eval().generate(PROMPT, num_bytes, seed)
    print(f"\n--- a sample, after {PROMPT.decode()!r} " + "-" * 40)
    print(text.decode("utf-8", errors="replace"))
    print("-" * 66 + "\n")


def compare(flash: History, plain: History, tolerance: float) -> tuple[bool, str]:
    """Did both runs tell the same story? Returns the answer and a table that shows it."""
    lines = ["| step | validation loss, FlashMHA | validation loss, plain | difference |", "|---:|---:|---:|---:|"]
    rows = zip(flash.eval_steps, flash.validation_loss, plain.validation_loss, strict=True)
    lines += [f"| {step} | {ours:.6f} | {other:.6f} | {abs(ours - other):.1e} |" for step, ours, other in rows]
    worst = largest_difference(flash, plain)
    same = worst <= tolerance  # False for NaN
    verdict = "the same" if same else "NOT the same"
    lines.append(f"\nValidation loss: {verdict} (largest difference {worst:.1e}, allowed {tolerance:g}).")
    speeds = ", ".join(f"{run.attention} attention {run.tokens_per_second:,.0f}" for run in (flash, plain))
    lines.append(f"Training speed, tokens per second: {speeds}.")
    return same, "\n".join(lines)


def measure_attention(arguments: argparse.Namespace, device: torch.device) -> list[Point]:
    """Time and memory of attention alone, at the lengths of this run."""
    seqlens = (512, 1024) if arguments.quick else (512, 1024, 2048, 4096, 8192, 16384)
    return sweep(seqlens, device.type, seconds=0.2 if arguments.quick else 1.0)


def main() -> int:
    """Run the whole demo; 0 when both implementations agree, 1 otherwise."""
    started = time.perf_counter()
    arguments = parse_arguments()
    device = choose_device(arguments.device)
    config = train_config(arguments)
    model_config = GPTConfig(arguments.context, arguments.width, arguments.layers, arguments.heads)
    arguments.out.mkdir(parents=True, exist_ok=True)

    corpus = Corpus.from_standard_library()
    print(f"machine: {describe_machine(device)}")
    print(
        f"text:    {corpus.num_files} files of Python's standard library, {corpus.train.numel() / 1e6:.1f} MB to train"
        f" on, {corpus.validation.numel() / 1e6:.1f} MB held out"
    )
    model, flash = train(corpus, model_config, config, "flash", device)
    _, plain = train(corpus, model_config, config, "plain", device)
    print_sample(model, arguments.sample_bytes, config.seed, device)

    tolerance = TOLERANCE[device.type]
    same, comparison = compare(flash, plain, tolerance)
    print(comparison + "\n")
    plot_losses(flash, plain, tolerance, arguments.out / "loss_curves.png")

    points = measure_attention(arguments, device)
    table = "Causal attention alone, forward + backward:\n\n" + markdown_table(points)
    print("\n" + table + "\n")
    plot_scaling(points, device.type, arguments.out / "attention_scaling.png")
    (arguments.out / "summary.md").write_text(f"{describe_machine(device)}\n\n{comparison}\n\n{table}\n")

    print(f"Figures and summary.md are in {arguments.out}. The demo took {time.perf_counter() - started:.0f} s.")
    if not same:
        print("The two implementations of attention disagree.", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
