"""A trained model as a file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from gpt.model import GPT, GPTConfig


def save(model: GPT, path: Path) -> None:
    """Size and weights. The kind of attention does not matter: the parameters are the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"config": asdict(model.config), "weights": model.state_dict()}, path)


def load(path: Path, device: torch.device) -> GPT:
    """The model with FlashMHA. ValueError if the file is not of `save`."""
    try:
        found = torch.load(path, map_location=device, weights_only=True)
        model = GPT(GPTConfig(**found["config"]), "flash", seed=0).to(device)
        model.load_state_dict(found["weights"])
    except Exception as error:
        raise ValueError(f"{path}: expected a model that train_gpt.py saved, got {type(error).__name__}") from error
    return model
