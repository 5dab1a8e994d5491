"""Tables cached by modules, used by compilers, fake tensors, transforms and other threads.

A table made in inference mode could not be used in training; one made under FakeTensorMode was used as real, and the
next call was not rotated; every longer sequence recompiled a module; two threads could mix two tables.

Public threads: Dao-AILab/flash-attention#299, Dao-AILab/quack#150, pytorch/pytorch#160066
"""

import copy
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.modules.mha import MHA
from plain_attention import assert_near, assert_same, gradients, leaves

EMBED, HEADS = 16, 2
KINDS = {
    "rotary": {"rotary_emb_dim": 8},
    "plain rotary": {"rotary_emb_dim": 8, "use_flash_attn": False},
    "xPos, GQA": {"rotary_emb_dim": 4, "rotary_emb_scale_base": 64.0, "num_heads_kv": 1},
    "ALiBi": {"use_alibi": True},
    "plain ALiBi": {"use_alibi": True, "use_flash_attn": False},
}
with_kinds = pytest.mark.parametrize("kind", KINDS)


def build(kind):
    torch.manual_seed(4)
    return MHA(EMBED, HEADS, **{"causal": True, "use_flash_attn": True, **KINDS[kind]})


def x_of(seqlen, seed=0):
    return leaves((2, seqlen, EMBED), dtype=torch.float32, seed=seed)[0]


def results(module, x):
    out = module(x)
    return [out, *gradients(out, (x, *module.parameters()))]


def fake(module, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        module(mode.from_tensor(x.detach()))


def infer(module, x):
    with torch.inference_mode():
        module(x)


STRANGERS = {
    "fake tensors": fake,
    "inference mode": infer,
    "compiled in inference mode": lambda module, x: infer(torch.compile(module, backend="aot_eager"), x),
    "torch.func.grad": lambda module, x: torch.func.grad(lambda t: module(t).sum())(x.detach()),
    "torch.func.vjp": lambda module, x: torch.func.vjp(module, x.detach())[1](torch.ones_like(x)),
    "make_fx": lambda module, x: make_fx(module)(x.detach()),
    "fake make_fx": lambda module, x: make_fx(module, tracing_mode="fake", _allow_non_fake_inputs=True)(x.detach()),
    "torch.export": lambda module, x: torch.export.export(module, (x.detach(),)),
    "torch.jit.trace": lambda module, x: torch.jit.trace(module, x.detach(), check_trace=False),
    "the meta device": lambda module, x: copy.deepcopy(module).to("meta")(x.detach().to("meta")),
}


@pytest.mark.filterwarnings("ignore")
@with_kinds
@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)
@pytest.mark.parametrize("seqlens", [(5, 5), (9, 5), (5, 9)], ids=str)
def test_first_call_by_a_stranger(seqlens, stranger, kind):
    """A first call under a mode or transform does not affect later ones, and leaves only tensors that can be copied."""
    torch.compiler.reset()
    module, (before, after) = build(kind), seqlens
    stranger(module, x_of(before))
    assert_same(results(module, x_of(after)), results(build(kind), x_of(after)))
    assert_same(results(copy.deepcopy(module), x_of(after)), results(module, x_of(after)))


# Plain attention has the same tables, and its graphs take longest to compile.
with_kinds_whole = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.whole) if "plain" in kind else kind for kind in KINDS]
)


@with_kinds_whole
def test_number_of_graphs_for_growing_lengths(kind):
    torch.compiler.reset()
    module, counter = build(kind), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, dynamic=True, fullgraph=True)
    for seqlen in range(3, 43, 4):
        x = x_of(seqlen, seed=seqlen)
        assert_near(results(compiled, x), results(module, x), atol=1e-4)
    assert counter.frame_count <= 4


@pytest.mark.parametrize("kind", ["rotary", "xPos, GQA", "ALiBi"])
def test_export_after_a_short_call(kind):
    module = build(kind)
    module(x_of(3))
    seqlen = torch.export.Dim("seqlen", min=2, max=4096)
    program = torch.export.export(module, (x_of(8).detach(),), dynamic_shapes=({1: seqlen},))
    for length in (2, 8, 33):
        x = x_of(length, seed=length).detach()
        assert_near([program.module()(x)], [module(x)], atol=1e-5)


@pytest.mark.parametrize("kind", ["rotary", "xPos, GQA"])
def test_selective_checkpointing_recomputes_what_it_saw(kind):
    """Every cos and sin is saved: cached tables must not replace those of this call."""

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.cos.default else CheckpointPolicy.PREFER_RECOMPUTE

    module, x = build(kind), x_of(6)
    expected = results(build(kind), x)
    for _ in range(2):
        out = checkpoint(
            lambda t: module(t.cos()), x, use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )  # fmt: skip
        found = gradients(out, (x, *module.parameters()))
        plain = build(kind)
        assert_same(found, gradients(plain(x.cos()), (x, *plain.parameters())))
    assert_same(results(module, x), expected)


def test_threads_share_a_module():
    """Calls with different lengths replace the cached tables all the time."""
    module = build("xPos, GQA")
    inputs = {seqlen: x_of(seqlen, seed=seqlen).detach() for seqlen in (3, 17, 40, 64)}
    with torch.no_grad():
        expected = {seqlen: build("xPos, GQA")(x) for seqlen, x in inputs.items()}
    wrong = []

    def work(seqlen):
        with torch.no_grad():
            for _ in range(60):
                # Not bitwise: the first product in a new thread may use another number of threads.
                if (module(inputs[seqlen]) - expected[seqlen]).abs().max() > 1e-5:
                    wrong.append(seqlen)

    threads = [threading.Thread(target=work, args=(seqlen,)) for seqlen in inputs for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@with_kinds
def test_torch_func(kind):
    """torch.func.grad and vjp of a module with its parameters as arguments."""
    module, x = build(kind), x_of(6)
    expected = torch.autograd.grad(module(x).sum(), list(module.parameters()))

    def loss(parameters):
        return torch.func.functional_call(module, parameters, (x.detach(),)).sum()

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    assert_same(torch.func.grad(loss)(parameters).values(), expected)
    _, pull = torch.func.vjp(loss, parameters)
    assert_same(pull(torch.tensor(1.0))[0].values(), expected)


def test_tables_that_a_subclass_keeps_while_faking_are_not_taken_for_real():
    rotary = RotaryEmbedding(8)
    with FakeTensorMode():
        rotary._update_cos_sin_cache(16, device=torch.device("cpu"), dtype=torch.float32)
    (qkv,) = leaves((1, 5, 3, HEADS, 8), dtype=torch.float32)
    assert_same([rotary(qkv * 1.0)], [RotaryEmbedding(8)(qkv * 1.0)])


class Stretched(RotaryEmbedding):
    """A subclass as in other projects: its own tables under the attribute names of 2.8.3."""

    made = 0

    def _update_cos_sin_cache(self, seqlen, device=None, dtype=None):
        if seqlen <= self._seq_len_cached and self._cos_cached is not None and self._cos_cached.dtype == dtype:
            return
        self.made += 1
        self._seq_len_cached = seqlen
        angles = torch.arange(seqlen, device=device)[:, None] * self.inv_freq.to(device) / 4
        self._cos_cached, self._sin_cached = angles.cos().to(dtype), angles.sin().to(dtype)


def test_a_subclass_makes_tables_of_its_own():
    own, same = Stretched(8), RotaryEmbedding(8)
    same.inv_freq = same.inv_freq / 4
    for seqlen in (5, 9, 4):
        (qkv,) = leaves((1, seqlen, 3, HEADS, 8), dtype=torch.float32)
        assert_near([own(qkv * 1.0)], [same(qkv * 1.0)], atol=1e-6)
    assert own.made == 2
    module = build("rotary")
    module.rotary_emb = own
    expected = build("rotary")
    expected.rotary_emb = same
    assert_near([module(x_of(12))], [expected(x_of(12))], atol=1e-6)
    assert_near([copy.deepcopy(module)(x_of(12))], [expected(x_of(12))], atol=1e-6)


@pytest.mark.parametrize(("name", "value"), [("_seq_len_cached", 0), ("_cos_cached", None)])
def test_tables_can_be_dropped(name, value):
    rotary = RotaryEmbedding(8)
    (qkv,) = leaves((1, 5, 3, HEADS, 8), dtype=torch.float32)
    expected = rotary(qkv * 1.0)
    before = rotary._sin_cached
    setattr(rotary, name, value)
    assert_same([rotary(qkv * 1.0)], [expected])
    assert rotary._sin_cached is not before
