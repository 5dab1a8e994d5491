"""Families of models with flash_attn instead of eager attention: outputs and gradients, compiled, exported, trained."""

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers

from compare import compare
from flash_attn.integrations._transformers_attention import attention_forward, padding_mask
from tiny_models import FAMILIES, SIZES, VOCABULARY, load_model, padded_batch, positions, save_model

IMPLEMENTATIONS = ("flash_attention_2", "fa2")
IS_OLD = transformers.__version__.startswith("4.")
_ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_GPT_OSS = {
    **SIZES,
    "num_attention_heads": 8,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
_MODERNBERT = {
    **_ENCODER,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 3,
    "local_attention": 6,
    "global_attn_every_n_layers": 3,
    "max_position_embeddings": 64,
    **{f"{name}_token_id": None if name in ("bos", "eos") else 0 for name in ("pad", "bos", "eos", "cls", "sep")},
}
_WHISPER = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "num_mel_bins": 8,
    "max_source_positions": 30,
    "max_target_positions": 20,
    "init_std": 0.2,
    **{
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 96}.items()
    },
    **{f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "decoder_start")},
}


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def tokens(side):
    """Padded input, with position_ids if padding comes first."""
    batch = padded_batch(side=side)
    return {**batch, "position_ids": positions(batch["attention_mask"])} if side == "left" else batch


def of_tokens(output, batch):
    """The rows that are no padding."""
    rows = output["logits"] if "logits" in output else output["last_hidden_state"]
    return rows[batch["attention_mask"].bool()] if "attention_mask" in batch else rows


@dataclass(frozen=True)
class Family:
    model: str
    config: Callable[[], Any]
    batch: Callable[[], dict[str, torch.Tensor]]
    layers: int  # in which attention is computed


MODELS = {
    "qwen2": Family("Qwen2ForCausalLM", lambda: transformers.Qwen2Config(**SIZES), lambda: tokens("left"), 2),
    "gpt_oss": Family("GptOssForCausalLM", lambda: transformers.GptOssConfig(**_GPT_OSS), lambda: tokens("left"), 2),
    "gpt2": Family(
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            **dict(_GPT2, initializer_range=0.2),
        ),
        lambda: tokens("left"),
        2,
    ),
    "bert": Family(
        "BertModel",
        lambda: transformers.BertConfig(vocab_size=VOCABULARY, **_ENCODER, **_NO_DROPOUT),
        lambda: tokens("right"),
        2,
    ),
    "modernbert": Family(
        "ModernBertModel", lambda: transformers.ModernBertConfig(**_MODERNBERT), lambda: tokens("right"), 3
    ),
    "vit": Family(
        "ViTModel",
        lambda: transformers.ViTConfig(image_size=32, patch_size=8, **_ENCODER, **_NO_DROPOUT),
        lambda: {"pixel_values": noise(3, 3, 32, 32)},
        2,
    ),
    "whisper": Family(
        "WhisperModel",
        lambda: transformers.WhisperConfig(**_WHISPER),
        lambda: {"input_features": noise(2, 8, 60), "decoder_input_ids": padded_batch()["input_ids"][:2]},
        6,
    ),
}


# In 4.57 BERT has no other attention than its own, ModernBERT a table of its own, with "flash_attention_2", and GPT-2
# says that attention is not causal where there is padding.
PAIRS = [
    (family, implementation)
    for family in MODELS
    for implementation in IMPLEMENTATIONS
    if not IS_OLD or not (family in ("bert", "gpt2") or (family == "modernbert" and implementation == "fa2"))
]
# The ModernBERT of 4.57 itself casts to bfloat16 for attention.
PAIRS_IN_FLOAT32 = [pair for pair in PAIRS if not (IS_OLD and pair[0] == "modernbert")]


def make(family, attention, dtype=torch.float32):
    """A model with the same random weights for every attention, rounded to bfloat16."""
    torch.manual_seed(0)
    model = getattr(transformers, MODELS[family].model)._from_config(
        MODELS[family].config(), attn_implementation=attention
    )
    assert model.config._attn_implementation == attention
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameter.bfloat16())
            if name.endswith("sinks"):
                parameter.copy_(torch.linspace(-2, 3, len(parameter)))
    return model.to(dtype).eval()


def run(family, attention, dtype=torch.float32):
    """The rows that count, and the gradient of each parameter that has one."""
    model, batch = make(family, attention, dtype), MODELS[family].batch()
    batch = {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}
    rows = of_tokens(model(**batch), batch)
    (rows.float() * noise(*rows.shape)).sum().backward()
    return rows.detach(), {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize(("family", "implementation"), PAIRS_IN_FLOAT32)
def test_outputs_and_gradients(family, implementation, calls):
    """float32: those of eager attention within 1e-4 of the largest value of each. Padding, windows, sinks, no mask."""
    expected, expected_grads = run(family, "eager")
    assert not calls
    rows, grads = run(family, implementation)
    assert calls.total() - calls["pad_input"] - calls["unpad_input"] == MODELS[family].layers
    assert grads.keys() == expected_grads.keys()
    for name, expected_one in {"rows": expected, **expected_grads}.items():
        bound = max(1e-4 * expected_one.abs().max().item(), 1e-5)  # the gradient of a key's bias is 0, rounded
        found = rows if name == "rows" else grads[name]
        torch.testing.assert_close(found, expected_one, rtol=0, atol=bound, msg=lambda text, name=name: name + text)
    for name in grads:
        assert not name.endswith("sinks") or grads[name].abs().max() > 0


@pytest.mark.parametrize(("family", "implementation"), PAIRS)
def test_outputs_in_bfloat16(family, implementation, calls):
    """The error is at most twice that of eager attention in bfloat16, plus 2 ulp of the largest value."""
    expected, plain = run(family, "eager")[0], run(family, "eager", torch.bfloat16)[0]
    compare("rows", run(family, implementation, torch.bfloat16)[0], expected, [plain])
    assert calls.total() - calls["pad_input"] - calls["unpad_input"] == MODELS[family].layers


@pytest.fixture
def llama(tmp_path):
    """By attention: a model, saved once."""
    path = save_model("llama", tmp_path)
    return lambda attention: load_model(path, attention)


def packed_batch():
    ids = torch.randint(1, VOCABULARY, (1, 11), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]])}


def equal_batch():
    return {"input_ids": padded_batch((11, 11))["input_ids"]}


# transformers' own function for packed sequences branches on their positions, where no graph can follow.
COMPILED = [("flash_attention_2", equal_batch), ("fa2", equal_batch), ("fa2", packed_batch)]


@pytest.mark.parametrize(("implementation", "batch"), COMPILED)
@pytest.mark.parametrize("how", ["compile", "export"])
def test_one_graph(how, implementation, batch, llama, calls):
    """torch.compile without a graph break, and torch.export."""
    inputs = {**batch(), "use_cache": False}
    with torch.no_grad():
        expected = llama("eager")(**inputs).logits
        model = llama(implementation)
        if how == "compile":
            torch.compiler.reset()
            found = torch.compile(model, fullgraph=True)(**inputs).logits
        else:
            found = torch.export.export(model, (), inputs, strict=False).module()(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_packed_rows(llama):
    """Several rows; sequences that begin above 0, or above where others do, and a gap that is none."""
    model, generator = llama("fa2"), torch.Generator().manual_seed(8)
    ids = torch.randint(1, VOCABULARY, (3, 9), generator=generator)
    rows = [[0, 1, 2, 3, 0, 1, 2, 3, 4], [3, 4, 5, 0, 1, 2, 7, 8, 9], [0, 1, 2, 3, 4, 5, 2, 3, 4]]
    lengths = [[4, 5], [3, 6], [6, 3]]
    found = model(input_ids=ids, position_ids=torch.tensor(rows), use_cache=False).logits
    eager = llama("eager")
    for b, row in enumerate(rows):
        parts = zip(ids[b].split(lengths[b]), torch.tensor(row).split(lengths[b]), strict=True)
        alone = torch.cat([eager(input_ids=x[None], position_ids=p[None]).logits[0] for x, p in parts])
        torch.testing.assert_close(found[b], alone, rtol=0, atol=1e-5 * alone.abs().max().item())
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)(
        input_ids=ids, position_ids=torch.tensor(rows), use_cache=False
    ).logits
    torch.testing.assert_close(compiled, found, rtol=0, atol=1e-5 * found.abs().max().item())


@pytest.mark.parametrize("num_queries", [1, 3, 5, 8])
def test_cross_attention_to_padded_keys(num_queries):
    """The mask is that of the keys alone: all queries see those that are there."""
    q, k, v = noise(2, 4, num_queries, 16), noise(2, 2, 5, 16), noise(2, 2, 5, 16)
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = attention_forward(torch.nn.Module(), q, k, v, keep, is_causal=False)[0]
    options = {"attn_mask": keep[:, None, None].bool(), "enable_gqa": True}
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_models_that_need_more_are_refused():
    """T5 adds a bias to scores."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": VOCABULARY}
    with pytest.raises(ValueError, match='attn_implementation="fa2": expected a model that supports flash attention'):
        transformers.T5EncoderModel._from_config(transformers.T5Config(**sizes), attn_implementation="fa2")


def test_masks_that_are_more_are_refused():
    """Chunks as in Llama 4, as long as there is more than one, and functions that a model passes."""
    chunks = {"config": types.SimpleNamespace(attention_chunk_size=4), "local_size": 4}
    position = {"cache_position": torch.arange(4)} if IS_OLD else {"q_length": 4, "q_offset": 0}
    assert padding_mask(batch_size=1, kv_length=4, **position, **chunks) is None
    with pytest.raises(ValueError, match="expected a mask of causality, a window and padding, got chunks of 4 keys"):
        padding_mask(batch_size=1, kv_length=5, **position, **chunks)
    with pytest.raises(ValueError, match="got a mask function of the model's own"):
        padding_mask(batch_size=1, kv_length=4, **position, use_vmap=True)


class Losses(transformers.TrainerCallback):
    """Those of every step."""

    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.values += [logs["loss"]] if "loss" in logs else []


def train(model, folder, bf16):
    """Losses of a few steps of the Trainer on packed sequences, with activation checkpointing."""
    losses = Losses()
    generator = torch.Generator().manual_seed(6)
    data = [{"input_ids": torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()} for n in (5, 9, 2, 11)]
    options = {"output_dir": str(folder), "use_cpu": True, "bf16": bf16, "report_to": [], "disable_tqdm": True}
    options |= {"gradient_checkpointing": True, "max_steps": 4, "logging_steps": 1, "learning_rate": 2e-3, "seed": 0}
    arguments = transformers.TrainingArguments(**options, per_device_train_batch_size=4, save_strategy="no")
    collate = transformers.DataCollatorWithFlattening()
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[losses]
    )
    trainer.train()
    return losses.values


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_trainer(implementation, llama, tmp_path, calls):
    """Packed sequences, checkpointed: losses are those of eager attention, near them in bfloat16, and fall."""
    expected = torch.tensor(train(llama("eager"), tmp_path, False))
    assert not calls
    found = torch.tensor(train(llama(implementation), tmp_path, True))
    assert calls["flash_attn_varlen_func"] == 2 * 2 * 4  # layers, forward and once more, steps
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    found = torch.tensor(train(llama(implementation), tmp_path, False))
    # The eager attention of 4.57 forgets about packing when a cache is there, as in evaluation.
    torch.testing.assert_close(found, expected, rtol=5e-3 if IS_OLD else 1e-4, atol=0)
    assert expected[-1] < expected[0] - 0.3


def test_families_are_those_of_the_other_files():
    assert not MODELS.keys() & FAMILIES.keys()
