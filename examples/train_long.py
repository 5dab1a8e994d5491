"""Train the demo's GPT on sequences that are too long for one process, by cutting each of them over several.

Every rank holds a part of each sequence, and attention sees the whole of it (flash_attn.context_parallel). What a rank
needs of memory falls with the number of ranks. With --compare, rank 0 trains the same model alone on whole sequences
afterwards, and both must have the same loss in every step. Results of each number of ranks and a figure go to --out.

    torchrun --standalone --nproc-per-node 2 examples/train_long.py --compare
    torchrun --standalone --nproc-per-node 2 examples/train_long.py --compare --quick   # seconds

On GPUs there is one process for each, and NCCL instead of gloo. For several machines see docs/context_parallel.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from gpt.data import Corpus
from gpt.machine import describe_machine
from gpt.memory import return_freed_tensors
from gpt.model import GPTConfig
from gpt.train import TrainConfig
from long.plots import plot_memory
from long.ranks import Ranks, join, num_cores
from long.train import Run, train

TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}  # nats per byte; float32 on a CPU, bfloat16 on a GPU
MB = 1e6


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="sequences of 3000 bytes, three steps")
    parser.add_argument("--compare", action="store_true", help="train on whole sequences, too, in one process")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output", help="folder for the results")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--method", choices=("ring", "all_gather", "ulysses"), default="ring")
    parser.add_argument("--layout", choices=("zigzag", "contiguous"), default="zigzag")
    parser.add_argument("--context", type=int, default=None, help="bytes of a sequence (32768)")
    parser.add_argument("--steps", type=int, default=None, help="training steps (6)")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences of a step")
    parser.add_argument("--learning-rate", type=float, default=TrainConfig.learning_rate)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def configs(arguments: argparse.Namespace) -> tuple[GPTConfig, TrainConfig]:
    """Model and training settings from the command line."""
    context = arguments.context or (3000 if arguments.quick else 32768)  # the last piece of 3000 is shorter
    steps = arguments.steps or (3 if arguments.quick else 6)
    training = TrainConfig(
        steps=steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        warmup_steps=steps // 4,
        seed=arguments.seed,
    )
    return GPTConfig(context, arguments.width, arguments.layers, arguments.heads), training


def loss_table(run: Run, whole: Run | None, num_ranks: int) -> str:
    """Losses step by step, and those of one process beside them."""
    if whole is None:
        lines = [f"| step | loss, {num_ranks} rank(s) |", "|---:|---:|"]
        lines += [f"| {step} | {loss:.6f} |" for step, loss in enumerate(run.losses)]
    else:
        lines = [f"| step | loss, {num_ranks} rank(s) | one process | difference |", "|---:|---:|---:|---:|"]
        rows = enumerate(zip(run.losses, whole.losses, strict=True))
        lines += [f"| {step} | {ours:.6f} | {other:.6f} | {abs(ours - other):.1e} |" for step, (ours, other) in rows]
    return "\n".join(lines)


def agree(run: Run, whole: Run, tolerance: float) -> bool:
    """Whether both runs have the same losses; says so."""
    differences = [abs(ours - other) for ours, other in zip(run.losses, whole.losses, strict=True)]
    same = all(difference <= tolerance for difference in differences)  # False for NaN
    verdict = "the same" if same else "NOT the same"
    print(f"Loss: {verdict} (largest difference {max(differences):.1e}, allowed {tolerance:g}).")
    return same


def settings(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What runs must have in common to stand in one figure."""
    model, training = configs(arguments)
    names = ("batch_size", "method", "layout")
    chosen = {name: getattr(arguments, name) for name in names}
    return {"device": describe_machine(device).split(",")[0], "steps": training.steps, **vars(model), **chosen}


def save(results: dict[str, Any], out: Path) -> None:
    """Results of this number of ranks, and the figure of all runs with the same settings."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"long-{len(results['peak_megabytes'])}.json").write_text(json.dumps(results, indent=1) + "\n")
    found = [json.loads(path.read_text()) for path in sorted(out.glob("long-*.json"))]
    peaks = [other["peak_megabytes"] for other in found if other["settings"] == results["settings"]]
    chosen = results["settings"]
    title = f"Training on sequences of {chosen['context']:,} tokens, {chosen['method']}"
    plot_memory(peaks, title, out / "context_parallel_memory.png")


def report(arguments: argparse.Namespace, ranks: Ranks, run: Run, whole: Run | None, peaks: list[float]) -> None:
    """Print and save what rank 0 knows."""
    seconds = min(run.seconds)
    print("\n" + loss_table(run, whole, ranks.size) + "\n")
    print("Peak memory of training, MB per rank: " + ", ".join(f"{peak:.0f}" for peak in peaks))
    alone = f"; one process: {min(whole.seconds):.2f} s" if whole else ""
    print(f"Quickest step: {seconds:.2f} s{alone}")
    results = {
        "settings": settings(arguments, ranks.device),
        "losses": run.losses,
        "seconds": run.seconds,
        "peak_megabytes": peaks,
    }
    save(results, arguments.out)
    print(f"long-{ranks.size}.json and context_parallel_memory.png are in {arguments.out}.")


def main() -> int:
    """Train; returns 0 unless --compare finds a difference."""
    arguments = parse_arguments()
    model_config, config = configs(arguments)
    return_freed_tensors()
    corpus = Corpus.from_standard_library()
    with join(arguments.device, arguments.method, arguments.layout) as ranks:
        if ranks.rank == 0:
            print(f"machine: {describe_machine(ranks.device)}, in each of {ranks.size} process(es)", flush=True)
        run = train(corpus, model_config, config, ranks.device, ranks)
        peaks = ranks.gather(run.peak_bytes / MB)
        same = True
        if ranks.rank == 0:
            if ranks.device.type == "cpu":
                torch.set_num_threads(num_cores())  # the others wait
            whole = train(corpus, model_config, config, ranks.device, None) if arguments.compare else None
            report(arguments, ranks, run, whole, peaks)
            same = whole is None or agree(run, whole, TOLERANCE[ranks.device.type])
        ranks.gather(0)  # no process leaves before rank 0 has finished
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
