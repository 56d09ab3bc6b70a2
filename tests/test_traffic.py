"""What ncu counts: which launch is whose, bytes beside the published, what warps wait for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import counters, evidence, traffic
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


# ---- counters ------------------------------------------------------------------------------------


def raw_page(*launches: dict) -> str:
    """ncu's raw page: the names, their units, then a line for each launch."""
    names = ["ID", "Kernel Name", *dict.fromkeys(key for one in launches for key in one)]
    names.remove("kernel")
    lines = [",".join(f'"{name}"' for name in names)]
    lines.append(",".join('""' if name in ("ID", "Kernel Name") else '"%"' for name in names))
    for i, one in enumerate(launches):
        values = (i, one["kernel"], *(one.get(name, "n/a") for name in names[2:]))
        lines.append(",".join(f'"{value}"' for value in values))
    return "\n".join(["==PROF== Connected", *lines])


STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"


def test_counters_of_a_call_are_those_of_its_launches(tmp_path):
    tensor = counters.TENSOR
    shape = {"m": 1, "n": 2, "k": 3}
    calls = [shape | {"name": "vendor"}, shape | {"name": "two_launches"}]
    output = f"{traffic.MARK}{json.dumps(calls)}\n"
    spin = {"kernel": "spin_kernel(long)", counters.TIME: "1,000"}
    gemm = {
        "kernel": "gemm", counters.TIME: "2,500,000", tensor: "91.5", counters.L2_HITS: "80.2",
        STALLED.format("long_scoreboard"): "1.5", STALLED.format("selected"): "9",
        STALLED.format("not_selected"): "7",
        STALLED.format("barrier"): "0.5", STALLED.format("wait"): "0.7",
        STALLED.format("sleeping"): "0.1",
    }  # fmt: skip
    small = {"kernel": "down_proj", counters.TIME: "100"}
    path = tmp_path / "counters.csv"
    path.write_text(raw_page(spin, gemm, spin, small, gemm | {tensor: "88"}))
    found = evidence.counters(finished(tmp_path, output), path)
    (vendor,), (down, ours) = (row["launches"] for row in found["rows"])
    assert vendor["us"] == 2500.0 and vendor["l2_hit_percent"] == 80.2
    assert vendor["tensor_percent"] == 91.5
    assert vendor["stalls"] == {"long_scoreboard": 1.5, "wait": 0.7, "barrier": 0.5}
    assert down["tensor_percent"] is None and down["stalls"] == {}
    assert ours["tensor_percent"] == 88.0
    assert found["headline"] == (
        "1x2x3 vendor: tensor 92 % L2 hits 80 % waits for long_scoreboard, "
        "1x2x3 two_launches: tensor 88 % L2 hits 80 % waits for long_scoreboard"
    )
    path.write_text(raw_page(spin, gemm))
    with pytest.raises(Failed, match="1 groups"):
        evidence.counters(finished(tmp_path, output), path)
    path.write_text("==ERROR== ERR_NVGPUCTRPERM")
    with pytest.raises(NotRun, match="ERR_NVGPUCTRPERM"):
        evidence.counters(finished(tmp_path, output, 1), path)
    path.unlink()
    with pytest.raises(Failed, match="did not finish"):
        evidence.counters(finished(tmp_path, "killed"), path)


def test_counted_calls_are_the_vendor_s_and_every_form_that_serves(monkeypatch):
    ops = torch.ops.lora_kernels
    made = []

    def plan(*arguments):
        if "one_launch" in arguments:
            raise RuntimeError("rank")
        return "a plan"

    monkeypatch.setattr(counters, "SHAPES", ((16, 24, 32),))
    monkeypatch.setattr(ops, "forward_plan", plan, raising=False)
    monkeypatch.setattr(ops, "forward_as", lambda *a: made.append(a[-3]), raising=False)
    found = list(counters.calls("cpu"))
    assert [about["name"] for about, _ in found] == ["vendor", "plain", "two_launches"]
    for _, call in found:
        call()
    assert made == ["", "two_launches"]
    assert found[1][0]["plan"] == "a plan" and "plan" not in found[0][0]
