"""Training on long sequences, by one process or by several that share each sequence."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpt.data import Corpus, TrainingBatches
from gpt.memory import peak_memory
from gpt.model import GPTConfig
from gpt.progress import progress_bar
from gpt.train import TrainConfig, mixed_precision
from long.model import LongGPT
from long.ranks import Ranks


@dataclass
class Run:
    """What this process saw of a run."""

    losses: list[float] = field(default_factory=list)  # of the whole batch, in nats per byte, one per step
    seconds: list[float] = field(default_factory=list)  # one per step
    peak_bytes: int = 0  # in all steps, beyond what the process held before the first


def train(
    corpus: Corpus, model_config: GPTConfig, config: TrainConfig, device: torch.device, ranks: Ranks | None
) -> Run:
    """Train a model on sequences that ranks share, or, without ranks, on whole ones.

    Both start with the same weights and see the same batches. Every rank reads whole batches and keeps its part.
    """
    model = LongGPT(model_config, config.seed, ranks).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    batches = TrainingBatches(corpus.train, config.batch_size, model_config.context, config.seed)
    run = Run()

    def all_steps() -> None:
        name = "one process" if ranks is None else f"{ranks.size} rank(s)"
        with progress_bar(config.steps, name, "step", shown=ranks is None or ranks.rank == 0) as bar:
            for step in range(config.steps):
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate_at(step)
                train_step(model, optimizer, next(batches), device, ranks, run)
                bar.update()

    run.peak_bytes = peak_memory(all_steps, device.type)
    return run


def train_step(
    model: LongGPT,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    device: torch.device,
    ranks: Ranks | None,
    run: Run,
) -> None:
    """One step. A rank's loss is the sum over its tokens / the number of all: over ranks they add up to the mean."""
    started = time.perf_counter()
    num_tokens, positions = batch[0].numel(), torch.arange(batch[0].shape[1])
    tokens, targets = batch
    if ranks is not None:
        tokens, targets, positions = ranks.part(tokens, 1), ranks.part(targets, 1), ranks.part(positions, 0)
    with mixed_precision(device):
        total = model.total_loss(tokens.to(device), targets.to(device), positions.to(device))
    loss = total / num_tokens
    optimizer.zero_grad()
    loss.backward()
    if ranks is not None:
        ranks.sum_gradients(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    run.losses.append(loss.item() if ranks is None else ranks.total(loss))
    run.seconds.append(time.perf_counter() - started)
