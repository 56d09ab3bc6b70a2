"""The fine-tuning example, small: the loss falls and every layer goes through the op."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_sentiment_example():
    pytest.importorskip("transformers")
    command = [sys.executable, str(ROOT / "examples/finetune_sentiment.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "LoRA layers" in done.stdout
