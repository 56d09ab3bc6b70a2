"""The example of many GPUs, on two processes: its three divisions of the work train alike."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
STEPS = 30
CLOSE = 1e-4  # of losses of 3 to 5; another mask, or a lost gradient, makes 1e-2 within ten steps


def losses(how: str, ranks: int) -> list[float]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(ranks), str(ROOT / "examples/train_distributed.py"), "--parallel", how,
        "--steps", str(STEPS), "--every", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{how} on {ranks} x" in done.stdout
    return [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
def test_ddp_fsdp_and_tp_have_one_loss_curve():
    alone = losses("ddp", 1)
    assert len(alone) == STEPS and alone[-1] < alone[0] - 1
    for how in ("ddp", "fsdp", "tp"):
        assert losses(how, 2) == pytest.approx(alone, abs=CLOSE)
