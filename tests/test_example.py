"""The fine-tuning examples, small: the loss falls and every layer goes through the op."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "example, needs",
    [
        ("finetune_sentiment", ["transformers"]),
        pytest.param("finetune_headlines", ["peft", "gguf"], marks=pytest.mark.slow),
    ],
)
def test_example(example, needs):
    for package in needs:
        pytest.importorskip(package)
    command = [sys.executable, str(ROOT / f"examples/{example}.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "LoRA layers" in done.stdout
