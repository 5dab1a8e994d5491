"""The training loop, and the comparison of two runs that should agree."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpt.data import Corpus, TrainingBatches, validation_batches
from gpt.model import GPT, GPTConfig
from gpt.progress import progress_bar


@dataclass(frozen=True)
class TrainConfig:
    """Training settings.

    At this learning rate training is stable: rounding differences do not grow. At twice the rate, with a smaller beta2,
    they grew until runs that differed only in rounding had visibly different losses.
    """

    steps: int = 1000
    batch_size: int = 4
    learning_rate: float = 1.5e-3
    warmup_steps: int = 50
    eval_every: int = 50
    eval_windows: int = 48
    seed: int = 0

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then cosine decay to a tenth."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


@dataclass
class History:
    """Results of one training run. Losses are in nats per byte."""

    attention: str
    train_loss: list[float] = field(default_factory=list)  # one per step
    eval_steps: list[int] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)  # one per entry of eval_steps
    training_seconds: float = 0.0  # without evaluations
    tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Training speed; a token is a byte."""
        return self.tokens / self.training_seconds


def mixed_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """float32 on a CPU; on a GPU bfloat16 autocast."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


@torch.no_grad()
def evaluate(model: GPT, batches: list[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Mean loss over the validation windows."""
    model.eval()
    with mixed_precision(device):
        losses = [model.loss(tokens.to(device), targets.to(device)).item() for tokens, targets in batches]
    model.train()
    weights = [tokens.shape[0] for tokens, _ in batches]
    return sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)


def train(
    corpus: Corpus, model_config: GPTConfig, config: TrainConfig, attention: str, device: torch.device
) -> tuple[GPT, History]:
    """Train one model. Runs that differ only in `attention` use the same initial weights and batches."""
    model = GPT(model_config, attention, config.seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    batches = TrainingBatches(corpus.train, config.batch_size, model_config.context, config.seed)
    held_out = validation_batches(corpus.validation, config.eval_windows, config.batch_size, model_config.context)
    history = History(attention)
    with progress_bar(config.steps, f"{attention:>5} attention", "step") as bar:
        for step in range(config.steps + 1):
            if step % config.eval_every == 0 or step == config.steps:
                history.eval_steps.append(step)
                history.validation_loss.append(evaluate(model, held_out, device))
                bar.set_postfix_str(f"validation loss {history.validation_loss[-1]:.3f}", refresh=False)
            if step < config.steps:
                _train_step(model, optimizer, config.learning_rate_at(step), next(batches), device, history)
                bar.update()
    return model, history


def _train_step(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    batch: tuple[Tensor, Tensor],
    device: torch.device,
    history: History,
) -> None:
    started = time.perf_counter()
    tokens, targets = (tensor.to(device) for tensor in batch)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    with mixed_precision(device):
        loss = model.loss(tokens, targets)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    history.train_loss.append(loss.item())  # synchronises with a GPU, so that the time below is right
    history.training_seconds += time.perf_counter() - started
    history.tokens += tokens.numel()


def largest_difference(a: History, b: History) -> float:
    """Largest difference of two runs' validation losses over all evaluations; NaN if any loss is NaN."""
    gaps = [abs(x - y) for x, y in zip(a.validation_loss, b.validation_loss, strict=True)]
    return math.nan if any(map(math.isnan, gaps)) else max(gaps)
