"""DRAM bytes: which launch of ncu's CSV is whose, and what is compared with the published bytes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import evidence, traffic
from bench.stages import Failed, Finished, NotRun


def finished(tmp_path: Path, text: str, code: int = 0) -> Finished:
    log = tmp_path / "stage.log"
    log.write_text(text)
    return Finished(code, log)


def ncu_csv(*launches: tuple[str, float, float]) -> str:
    lines = ["==PROF== Connected", '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"']
    for i, (kernel, read, written) in enumerate(launches):
        for name, value in ((traffic.READ, read), (traffic.WRITTEN, written)):
            lines.append(f'"{i}","{kernel}","{name}","byte","{value:,}"')
    return "\n".join(lines)


def test_dram_bytes_belong_to_their_calls(tmp_path):
    calls = [{"name": "kernel", "kernel": "down_proj", "operand_bytes": 1000}, {"name": "composed"}]
    calls[1] |= calls[0] | {"name": "composed"}
    output = f"{traffic.MARK}{json.dumps(calls)}\n"
    spin = ("spin_kernel(long)", 0, 32)
    path = tmp_path / "ncu.csv"
    path.write_text(ncu_csv(spin, ("down_proj", 1000, 100), spin, ("gemm", 1500, 0), ("k", 0, 500)))
    found = evidence.dram(finished(tmp_path, output), path)
    assert [row["over_operands"] for row in found["rows"]] == [1.1, 2.0]
    assert found["headline"] == "down_proj 1.10x operands"
    path.write_text(ncu_csv(spin, ("down_proj", 1000, 100), spin))
    with pytest.raises(Failed, match="2 groups"):
        evidence.dram(finished(tmp_path, output), path)
    path.write_text("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission")
    with pytest.raises(NotRun, match="ERR_NVGPUCTRPERM"):
        evidence.dram(finished(tmp_path, output, 1), path)


def test_dram_bytes_of_steps_are_compared_with_the_published(tmp_path):
    listed = [about for about, _ in traffic.steps((32,), 16, "composed", "cpu")]
    assert [call["name"] for call in listed] == ["composed", "eager"]
    # two bytes an element: x, y, dy, dx [16, 32], W [32, 32], A, B and their gradients [16, 32]
    assert {call["operand_bytes"] for call in listed} == {2 * (4 * 512 + 1024 + 4 * 512)}
    assert not any("published_bytes" in call for call in listed)
    calls = [call | {"k": 4096, "published_bytes": traffic.PUBLISHED[4096]} for call in listed]
    output = f"{traffic.MARK}{json.dumps(calls)}\n"
    spin = ("spin_kernel(long)", 0, 32)
    path = tmp_path / "ncu.csv"
    launches = (("down_proj", 1e9, 0), ("fused_gemm", 0, 258e6))
    path.write_text(ncu_csv(spin, *launches, spin, ("gemm", 2e9, 516e6)))
    found = evidence.dram(finished(tmp_path, output), path)
    assert [row["over_published"] for row in found["rows"]] == [1.0, 2.0]
    assert found["headline"] == (
        "step 4096 composed 1.258 GB 1.00x published, step 4096 eager 2.516 GB 2.00x published"
    )


def test_a_step_is_forward_and_backward_with_the_contract_s_dropout():
    (_, ours), (_, eager) = traffic.steps((32,), 16, "composed", "cpu")
    for call in (ours, eager):
        torch.manual_seed(0)
        first = call()
        assert [tuple(grad.shape) for grad in first] == [(16, 32), (16, 32), (32, 16)]
        assert not torch.equal(first[1], call()[1]), "a step draws another mask"
