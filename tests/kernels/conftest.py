"""What tests of kernels share: the GPU's kernels, run by JAX's interpreter on a CPU."""

import importlib.metadata

import pytest

from jaxdistill.kernels import choice


@pytest.fixture
def interpreted_gpu(monkeypatch):
    """From here on the operations take what a GPU would be given, and a CPU interprets it."""
    version = importlib.metadata.version("jax")
    if tuple(map(int, version.split(".")[:2])) < (0, 11):
        pytest.skip(f"Pallas kernels for GPUs need jax 0.11, this is {version}")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    device = choice.Device("gpu", "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(choice, "current_device", lambda: device)
    monkeypatch.setattr(choice, "INTERPRET", plgpu.InterpretGPUParams())
    assert choice.choose(None, 64, "float32") == "mosaic_gpu"
