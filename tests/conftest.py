"""Command line options and fixtures shared by all tests."""

import os
import time

import pytest
import torch

pytest_plugins = ("resume", "policies")

# Set before anything runs on the CPU: uninitialised memory is filled with NaN. See csrc/ops/cpu_host.h.
os.environ["FLASH_ATTN_CPU_POISON"] = "1"


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where tests of attention run (cpu)")
    parser.addoption("--whole", action="store_true", help="every case of tables that are sampled otherwise")
    parser.addoption("--seed", type=int, default=int(time.time()), help="which cases are sampled (the time)")


def pytest_configure(config):
    config.seed = getattr(config, "workerinput", {}).get("seed", config.getoption("--seed"))
    os.environ["FLASH_ATTN_TEST_DEVICE"] = config.getoption("--device")
    import device

    if not device.IS_GPU:
        return
    if reason := device.unavailable_reason():
        pytest.exit(f"pytest --device=cuda: {reason}", returncode=1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic matrix products
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Workers of pytest-xdist sample as their controller does."""
    node.workerinput["seed"] = node.config.seed


def pytest_report_header(config):
    if not config.getoption("--whole"):
        return f"long tables are sampled: --seed={config.seed} takes these cases again, --whole takes all"


def rank(item) -> int:
    """Sort key: tests marked first run first; tests marked last, which are slow or may crash the device, run last."""
    return bool(item.get_closest_marker("last")) - bool(item.get_closest_marker("first"))


def runs_here(item, is_gpu: bool) -> bool:
    """Whether a test runs: on a GPU, those with the fixture `device`, in dtypes that the kernels have."""
    if item.get_closest_marker("whole") and not item.config.getoption("--whole"):
        return False
    if not is_gpu:
        return item.get_closest_marker("gpu") is None
    parameters = getattr(item, "callspec", None)
    dtype = parameters.params.get("dtype") if parameters else None
    return "device" in item.fixturenames and str(dtype).removeprefix("torch.") not in ("float32", "float64")


def pytest_collection_modifyitems(config, items):
    is_gpu = config.getoption("--device") == "cuda"
    left_out = [item for item in items if not runs_here(item, is_gpu)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = sorted((item for item in items if runs_here(item, is_gpu)), key=rank)


@pytest.fixture(autouse=True)
def reset_state():
    """Reset the number of threads and the generator's seed before every test."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def device(request):
    """The name of the device under test; default device of new tensors."""
    name = request.config.getoption("--device")
    if name == "cpu":
        yield name
        return
    with torch.device(name):
        yield name


@pytest.fixture
def kernels(request, device, monkeypatch):
    """Parametrizes a test over the kernel families of the device."""
    monkeypatch.setenv("FLASH_ATTN_BACKEND", request.param)
    return request.param


def pytest_generate_tests(metafunc):
    if "kernels" in metafunc.fixturenames:
        from device import BACKENDS

        metafunc.parametrize("kernels", BACKENDS.values(), ids=BACKENDS, indirect=True)
