"""Settings that all tests share."""

import os

import pytest
import torch

# Before anything runs on the CPU: its memory is full of NaN wherever nothing has been written. See csrc/ops/cpu_host.h.
os.environ["FLASH_ATTN_CPU_POISON"] = "1"


@pytest.fixture(autouse=True)
def same_start():
    """Every test starts from one thread and one state of the generator, whichever ran before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
