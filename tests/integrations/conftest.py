"""Settings of the tests with the real transformers: no network; its way to flash_attn is opened, and calls counted."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import tiny_models


@pytest.fixture
def calls(monkeypatch):
    """How often each function of flash_attn has been called, by name."""
    return tiny_models.count_calls(monkeypatch)


@pytest.fixture
def gate(monkeypatch, calls):
    """attn_implementation="flash_attention_2" works on the CPU; gives the counter of calls."""
    tiny_models.open_gate(monkeypatch)
    return calls


@pytest.fixture
def registered(calls):
    """attn_implementation="fa_local" is a function of ours; gives the counter of calls."""
    AttentionInterface.register("fa_local", tiny_models.registered_attention)
    AttentionMaskInterface.register("fa_local", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    return calls
