"""Fixtures of the tests with the real transformers: no network, flash_attn registered, calls counted."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from flash_attn.integrations import transformers as integration

integration.register("fa2")  # before a model's module is imported: some look for flash_attn only then

import tiny_models  # noqa: E402


@pytest.fixture
def calls(monkeypatch):
    """Number of calls of each function of flash_attn, by name."""
    return tiny_models.count_calls(monkeypatch)
