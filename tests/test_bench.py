"""The benchmark's commands on a tiny problem: they run, and record what they measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *args], cwd=ROOT, capture_output=True, text=True)


def test_layers(tmp_path):
    out = tmp_path / "layers.json"
    done = run(
        "bench", "--shape", "16,24,32", "--rank", "4", "--dtype", "fp32", "--skip", "compiled",
        "--rounds", "3", "--json", str(out), "--plot", str(tmp_path / "layers.png"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert {row["name"] for row in result["groups"][0]["rows"]} >= {
        "frozen",
        "peft",
        "addmm",
        "cpu",
    }
    assert result["environment"]["torch"] and not result["failures"]
    assert (tmp_path / "layers.png").stat().st_size > 0


def test_list_and_bad_arguments():
    assert "llama-3.1-8b" in run("bench", "--list").stdout
    done = run("bench", "--dtype", "fp7")
    assert done.returncode == 2 and "fp7" in done.stderr
