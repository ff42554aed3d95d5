"""Shared by all tests: folders of their own, one thread per test process, small real checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from nodes.engine.pipeline import bases
from nodes.host import LocalHost

from . import tiny

torch.set_num_threads(max(1, min(2, os.cpu_count() or 1)))


@pytest.fixture
def host(tmp_path: Path) -> LocalHost:
    return LocalHost(
        model_folders=(tmp_path / "models",),
        lora_folders=(tmp_path / "loras",),
        output_folder=tmp_path / "output",
        cache_folder=tmp_path / "cache",
    )


@pytest.fixture(autouse=True)
def _nothing_resident():
    """No test inherits a base, nor a counter, from the one before."""
    bases.unload()
    bases.loads = 0
    yield
    bases.unload()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with random-weight checkpoints of every generation: see `tiny.KINDS`."""
    folder = tmp_path_factory.mktemp("models")
    for name in tiny.KINDS:
        tiny.write_checkpoint(folder, name)
    return folder


@pytest.fixture
def tiny_host(host: LocalHost, checkpoints: Path) -> LocalHost:
    host.model_folders = (checkpoints,)
    return host
