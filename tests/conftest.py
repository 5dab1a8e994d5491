"""Settings that all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_start():
    """Every test starts from one thread and one state of the generator, whichever ran before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
