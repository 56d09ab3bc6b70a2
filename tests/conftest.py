"""Fixtures: every backend that runs here, on CPU tensors."""

from __future__ import annotations

import pytest
import torch

import lora_kernels as lk

USABLE = [name for name, missing in lk.backends().items() if missing is None and name != "cuda"]
# Paths that round the frozen product before the rank-r term is added: their bound says so.
EAGER_LIKE = {"composed"}

torch.set_num_threads(1)  # xdist runs one worker a core; test_dropout.py tries more


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", USABLE)


@pytest.fixture
def eager_like(backend) -> bool:
    return backend in EAGER_LIKE


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
