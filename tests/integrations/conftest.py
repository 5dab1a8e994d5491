"""Fixtures of the tests with the real transformers: no network, flash_attention_2 enabled on the CPU, calls counted."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import tiny_models


@pytest.fixture
def calls(monkeypatch):
    """Number of calls of each function of flash_attn, by name."""
    return tiny_models.count_calls(monkeypatch)


@pytest.fixture
def gate(monkeypatch, calls):
    """Enable attn_implementation="flash_attention_2" on the CPU; returns the call counter."""
    tiny_models.open_gate(monkeypatch)
    return calls


@pytest.fixture
def registered(calls):
    """Register attn_implementation="fa_local", a function of ours; returns the call counter."""
    AttentionInterface.register("fa_local", tiny_models.registered_attention)
    AttentionMaskInterface.register("fa_local", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    return calls
