"""Training transformers models with flash_attn: padded batches and packed sequences."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorWithFlattening

from compare import compare
from tiny_models import FAMILIES, VOCABULARY, load_model, padded_batch, positions, save_model

LENGTHS = (11, 6, 1, 9)
IGNORED = -100


def backward(model, batch, autocast=False):
    """The loss of a padded batch and the gradients of all parameters."""
    model.train()
    mask = batch["attention_mask"]
    follows_a_token = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)  # padding predicts noise
    labels = batch["input_ids"].masked_fill(mask * follows_a_token == 0, IGNORED)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch, position_ids=positions(mask), labels=labels).loss
    loss.backward()
    return loss, gradients(model)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_near(actual, expected):
    """float32 gradients, each within 1e-5 of its largest value."""
    for name, gradient in expected.items():
        bound = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(actual[name], gradient, rtol=0, atol=bound, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_trains(calls, family, side, tmp_path):
    """Users fine-tune on padded batches, ignoring padding in the loss; gradients equal those of eager attention."""
    path = save_model(family, tmp_path)
    batch = padded_batch(LENGTHS, side)
    expected_loss, expected = backward(load_model(path, "eager"), batch)
    assert not calls
    loss, actual = backward(load_model(path, "flash_attention_2"), batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert_near(actual, expected)
    assert calls["flash_attn_varlen_func"] == calls["pad_input"] == 2


def test_registered_function_trains(calls, tmp_path):
    """Users register a function that calls flash_attn, and fine-tune with it."""
    path = save_model("llama", tmp_path)
    batch = padded_batch(LENGTHS)
    expected = backward(load_model(path, "eager"), batch)[1]
    assert_near(backward(load_model(path, "fa2"), batch)[1], expected)
    assert calls["flash_attn_varlen_func"] == 2


def test_padded_batch_trains_with_checkpointing(calls, tmp_path):
    """Users call gradient_checkpointing_enable: every layer runs twice, and gradients do not change."""
    path = save_model("llama", tmp_path)
    batch = padded_batch(LENGTHS)
    expected = backward(load_model(path, "eager"), batch)[1]
    model = load_model(path, "flash_attention_2")
    model.gradient_checkpointing_enable()
    assert_near(backward(model, batch)[1], expected)
    assert calls["flash_attn_varlen_func"] == 4


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_padded_batch_trains_in_bfloat16(calls, autocast, tmp_path):
    """Users train in bfloat16, or under autocast with float32 weights.

    The error of each gradient, against eager attention in float32, is at most three times that of eager attention in
    the same precision, plus 2 ulp of bfloat16.
    """
    path = save_model("llama", tmp_path, torch.bfloat16)
    batch = padded_batch(LENGTHS)
    dtype = torch.float32 if autocast else torch.bfloat16
    expected = backward(load_model(path, "eager"), batch)[1]
    plain = backward(load_model(path, "eager", dtype), batch, autocast)[1]
    actual = backward(load_model(path, "flash_attention_2", dtype), batch, autocast)[1]
    for name, gradient in actual.items():
        compare(name, gradient.bfloat16(), expected[name], [plain[name]], factor=3.0)
    assert calls["flash_attn_varlen_func"] == 2


@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_batch_trains(calls, family, given, tmp_path):
    """Users train without padding: DataCollatorWithFlattening concatenates the sequences of a batch.

    There is no mask: sequence starts are inferred from position_ids, which restart (max_seqlen is then a 0-dim tensor),
    or given as cu_seq_lens. Logits and gradients equal those of eager attention for each sequence alone.
    """
    path = save_model(family, tmp_path)
    generator = torch.Generator().manual_seed(2)
    sequences = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=given == "cu_seq_lens")
    batch = collate([{"input_ids": tokens.tolist()} for tokens in sequences])
    assert "attention_mask" not in batch

    eager = load_model(path, "eager").train()
    alone = torch.cat([eager(tokens[None]).logits[0] for tokens in sequences])
    targets = batch["labels"][0, 1:]
    F.cross_entropy(alone[:-1], targets, ignore_index=IGNORED).backward()
    assert not calls

    model = load_model(path, "flash_attention_2").train()
    out = model(**batch)
    out.loss.backward()
    torch.testing.assert_close(out.logits[0], alone, rtol=0, atol=1e-5 * alone.abs().max().item())
    assert_near(gradients(model), gradients(eager))
    assert calls["flash_attn_varlen_func"] == 2
    assert calls["flash_attn_func"] == calls["pad_input"] == 0
