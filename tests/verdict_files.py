"""Fixtures and edits of verdict files, for the tests of reading and of using them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dispatch_facts import points, record

from lora_kernels import dispatch, verdicts


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(verdicts.ENV, str(folder))
    monkeypatch.setattr(verdicts, "_warned", set())
    dispatch.use_shared()
    yield folder
    dispatch.use_shared()


@pytest.fixture
def path(cache) -> Path:
    """The file of a good verdict."""
    return verdicts.save(record(points()))


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def faster(content: dict) -> None:
    content["verdict"]["points"][0]["ours_ms"] = 0.001
