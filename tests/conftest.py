"""Settings that all tests share."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("flash_attn", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("flash_attn")


@pytest.fixture(autouse=True)
def same_start():
    """Every test starts from one thread and one state of the generator, whichever ran before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
