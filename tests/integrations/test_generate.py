"""generate, and forward passes of padded batches, with flash_attn instead of transformers' own attention."""

import pytest
import torch

from compare import compare
from tiny_models import FAMILIES, load_model, padded_batch, positions, save_model

NEW = 12
IMPLEMENTATIONS = ("flash_attention_2", "fa2")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, calls):
    """An attn_implementation and the counter of calls of our functions."""
    return request.param, calls


def generate(model, batch, **options):
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, **options}
    return model.generate(**batch, **options)


def logits(model, batch):
    """Logits of the non-padding tokens: (total, vocabulary)."""
    with torch.no_grad():
        out = model(**batch, position_ids=positions(batch["attention_mask"])).logits
    return out[batch["attention_mask"].bool()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"num_beams": 3},
    ],
    ids=["dynamic", "static", "no_cache", "prefill_in_chunks", "beams"],
)
def test_padded_batch_generates(implementation, options, tmp_path):
    """Users left-pad prompts of different lengths and call generate; all tokens equal those of eager attention.

    In decoding steps transformers passes int32 indices to pad_input. Chunked prefill calls our unpad_input, with
    sequences that have no token in the first chunk.
    Public thread: huggingface/transformers#29075
    """
    name, calls = implementation
    path = save_model("llama", tmp_path)
    batch = padded_batch()
    expected = generate(load_model(path, "eager"), batch, **options)
    unmasked = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    assert not torch.equal(generate(load_model(path, "eager"), unmasked, **options), expected), "padding has no effect"
    assert not calls
    assert torch.equal(generate(load_model(path, name), batch, **options), expected)
    assert calls["flash_attn_varlen_func"] >= 2 * NEW  # two layers
    assert calls["pad_input"] == calls["flash_attn_varlen_func"]
    if "prefill_chunk_size" in options or name == "fa2":
        assert calls["unpad_input"] > 0


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"llama"}))
def test_padded_batch_generates_with_windows(implementation, family, tmp_path):
    """Mistral and Gemma 2: windows shorter than the prompts, in every or every other layer; softcap."""
    name, calls = implementation
    path = save_model(family, tmp_path)
    batch = padded_batch()
    expected = generate(load_model(path, "eager"), batch)
    assert torch.equal(generate(load_model(path, name), batch), expected)
    assert calls["flash_attn_varlen_func"] >= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_without_padding_generates(implementation, family, tmp_path):
    """Prompts of equal length: transformers calls flash_attn_func."""
    name, calls = implementation
    path = save_model(family, tmp_path)
    batch = padded_batch(lengths=(11, 11))
    expected = generate(load_model(path, "eager"), batch)
    assert torch.equal(generate(load_model(path, name), batch), expected)
    assert calls["flash_attn_func"] == 2 * NEW
    assert calls["flash_attn_varlen_func"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_static_cache_without_padding(family, calls, tmp_path):
    """A static cache has more keys than were written: queries are not the last of them. There is no mask to say so.

    With "flash_attention_2" that is for transformers to say, which 4.57 does not.
    """
    path = save_model(family, tmp_path)
    batch, options = padded_batch(lengths=(5, 5)), {"cache_implementation": "static"}
    expected = generate(load_model(path, "eager"), batch, **options)
    assert torch.equal(generate(load_model(path, "fa2"), batch, **options), expected)
    assert calls["flash_attn_varlen_func"] + calls["flash_attn_func"] == 2 * NEW


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batch_in_bfloat16(implementation, family, side, tmp_path):
    """Users load a model in bfloat16 and read its logits.

    Their error, against eager attention in float32 with the same weights, is at most twice that of eager attention in
    bfloat16, plus 2 ulp of the largest logit.
    """
    name, calls = implementation
    path = save_model(family, tmp_path, torch.bfloat16)
    batch = padded_batch(side=side)
    expected = logits(load_model(path, "eager", torch.float32), batch)
    plain = logits(load_model(path, "eager", torch.bfloat16), batch)
    assert not calls
    compare("logits", logits(load_model(path, name, torch.bfloat16), batch), expected, [plain])
    assert calls["flash_attn_varlen_func"] == 2
