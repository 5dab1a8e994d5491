"""A transformer of diffusers on flash_attn: by its own backends, and behind scaled_dot_product_attention."""

import diffusers
import pytest
import torch
from diffusers.models import attention_dispatch

from flash_attn.integrations import sdpa

CONFIG = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
}
ATTENTION_LAYERS = 2


def run(backend):
    """Output of a Flux with random weights, and the gradients of its parameters."""
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(**CONFIG)
    model.set_attention_backend(backend)
    inputs = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.randn(8, 3),
    }
    out = model(**inputs).sample
    return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()), allow_unused=True)]


@pytest.fixture
def provider():
    torch.nn.attention.activate_flash_attention_impl("flash_attn")
    yield
    torch.nn.attention.restore_flash_attention_impl()


@pytest.mark.parametrize("backend", ["flash", "flash_varlen", "native"])
def test_flux(backend, monkeypatch, request):
    """Output and gradients are those of PyTorch's attention; nothing is patched or registered with diffusers."""
    expected = run("native")
    calls = []

    def counted(module, name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: (calls.append(name), function(*args, **kwargs))[1])

    if backend == "native":
        request.getfixturevalue("provider")
        counted(sdpa, "_fwd_out")
    else:
        counted(attention_dispatch, {"flash": "flash_attn_func", "flash_varlen": "flash_attn_varlen_func"}[backend])
    found = run(backend)
    assert len(calls) == ATTENTION_LAYERS
    for x, y in zip(found, expected, strict=True):
        assert (x is None) == (y is None)
        if y is not None:
            torch.testing.assert_close(x, y, rtol=0, atol=1e-5 * max(1.0, y.abs().max().item()))
