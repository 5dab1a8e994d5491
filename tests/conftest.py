"""Options and settings that all tests share."""

import os

import pytest
import torch

pytest_plugins = ("resume",)

# Before anything runs on the CPU: its memory is full of NaN wherever nothing has been written. See csrc/ops/cpu_host.h.
os.environ["FLASH_ATTN_CPU_POISON"] = "1"


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where tests of attention run (cpu)")
    parser.addoption("--whole", action="store_true", help="tables whole that are sampled otherwise: make test-all")


def pytest_configure(config):
    os.environ["FLASH_ATTN_TEST_DEVICE"] = config.getoption("--device")
    import device

    if not device.IS_GPU:
        return
    if reason := device.unavailable_reason():
        pytest.exit(f"pytest --device=cuda: {reason}", returncode=1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for products under deterministic algorithms
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def rank(item) -> int:
    """What is marked first comes first, and what is marked last, because it takes long or may do harm, last."""
    return bool(item.get_closest_marker("last")) - bool(item.get_closest_marker("first"))


def concerns(item, is_gpu: bool) -> bool:
    """Whether a test says something about the device: of a GPU, with types that its kernels have."""
    if not is_gpu:
        return item.get_closest_marker("gpu") is None
    parameters = getattr(item, "callspec", None)
    dtype = parameters.params.get("dtype") if parameters else None
    return "device" in item.fixturenames and str(dtype).removeprefix("torch.") not in ("float32", "float64")


def pytest_collection_modifyitems(config, items):
    is_gpu = config.getoption("--device") == "cuda"
    left_out = [item for item in items if not concerns(item, is_gpu)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = sorted((item for item in items if concerns(item, is_gpu)), key=rank)


@pytest.fixture(autouse=True)
def same_start():
    """Every test starts from one thread and one state of the generator, whichever ran before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def device(request):
    """The device's name. What a test makes is made there."""
    name = request.config.getoption("--device")
    if name == "cpu":
        yield name
        return
    with torch.device(name):
        yield name


@pytest.fixture
def kernels(request, device, monkeypatch):
    """Runs a test by every family of kernels that the device has."""
    monkeypatch.setenv("FLASH_ATTN_BACKEND", request.param)
    return request.param


def pytest_generate_tests(metafunc):
    if "kernels" in metafunc.fixturenames:
        from device import BACKENDS

        metafunc.parametrize("kernels", BACKENDS.values(), ids=BACKENDS, indirect=True)
