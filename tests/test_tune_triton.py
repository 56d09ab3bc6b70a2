"""The measurement of Triton's tile plans: what it tries, refuses and writes, by made-up times."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton_interpreter import INTERPRETED  # before anything imports Triton

from lora_kernels import composed

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from bench import triton_plans, tune_triton  # noqa: E402
from lora_kernels.triton_kernels import configs, device  # noqa: E402
from lora_kernels.triton_kernels.configs import Config, plan_of  # noqa: E402

FAMILIES = ("sm80", "sm90", "sm100", "amd")
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")


class FakeTimer:
    """Milliseconds by a function of the plan and the name of the call; runs nothing."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, call) -> float:
        _, config, timed = call.args
        return self.factor(config, timed.__name__)


@pytest.fixture
def tune(monkeypatch, tmp_path):
    """Runs the command with made-up times: (exit code, the table it wrote, if any)."""

    def run(factor, *arguments: str, calls=None) -> tuple[int, dict | None]:
        out = tmp_path / "configs.json"
        out.unlink(missing_ok=True)
        monkeypatch.setattr(tune_triton.timing, "make_timer", lambda device: FakeTimer(factor))
        monkeypatch.setitem(tune_triton.timing.WARM_UP_CALLS, "cpu", 0)
        monkeypatch.setattr(tune_triton, "device_here", lambda dry_run: CPU)
        if calls is not None:
            monkeypatch.setattr(triton_plans, "calls", calls)
            monkeypatch.setattr(triton_plans, "TINY_ROWS", (16,))
        monkeypatch.setattr(sys, "argv", ["tune_triton", "--out", str(out), *arguments])
        code = tune_triton.main()
        return code, json.loads(out.read_text()) if out.exists() else None

    return run


def right(kernel, p, h, dh):
    """down_proj by composed, whatever the plan."""
    return {"dh": lambda: composed.down_proj(p.dy, p.lora_b.t(), None, 0, p.scaling)}


# ---- the table -----------------------------------------------------------------------------------


def test_the_writer_writes_the_shipped_table():
    assert tune_triton.dump(configs.load()) == configs.TABLE.read_text()


def test_the_shipped_table_says_of_each_family_where_it_comes_from():
    table = configs.load()
    for kernel in configs.KERNELS:
        assert set(table[kernel]) == set(table["origin"]), kernel


def test_elements_that_are_loaded_one_by_one_are_not_tma_s():
    """A window's tiles may begin anywhere, TMA's in the interpreter at 16 bytes."""
    for family in configs.load()["origin"]:
        for width in tune_triton.WIDTHS:
            rows = configs.load()["fused_gemm"][family][f"{width} scattered"]
            assert all(row["kind"] != "descriptors" for row in rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_that_is_measured_holds_a_shape(family):
    table = configs.load()
    rows = tune_triton.rows_of(table, family, list(configs.KERNELS))
    used = {kernel for kernel in configs.KERNELS if configs.is_used(kernel, family, "16")}
    assert {row.kernel for row in rows} == used
    for row in rows:
        present = plan_of(table[row.kernel][family][row.width][row.number])
        shapes = triton_plans.shapes(row.kernel, row.low, row.up_to, present, False)
        assert shapes, row
        for shape in shapes:
            size = shape.m if row.kernel == "fused_gemm" else shape.r
            assert configs.lookup(row.kernel, family, row.width, size) == present
            assert all(side % 16 == 0 for side in shape), "or it would be scattered"


def test_a_tuned_table_has_other_plans_in_its_rows_alone():
    table = configs.load()
    before = json.dumps(table)
    row = tune_triton.Row("fused_gemm", "16", 2, 512, None)
    plan = plan_of(table["fused_gemm"]["sm90"]["16"][2])
    found = tune_triton.tuned(table, "sm90", {row: replace(plan, stages=9, group=3)}, "a test")
    assert json.dumps(table) == before
    lines = [tune_triton.dump(t).splitlines() for t in (table, found)]
    changed = [pair for pair in zip(*lines, strict=True) if pair[0] != pair[1]]
    assert len(changed) == 2 and '"sm90": "a test"' in changed[0][1]
    assert changed[1][1] == changed[1][0].replace('"stages": 3', '"stages": 9').replace(
        f'"group": {plan.group}', '"group": 3'
    )


def test_a_trial_counts_within_its_block_alone():
    x = torch.zeros(32, 32)
    table = configs.of("down_proj", 16, 0, x)
    first, second = replace(table, rows=16), replace(table, rows=32)
    with configs.using("down_proj", first):
        assert configs.of("down_proj", 16, 0, x) == first
        with pytest.raises(ZeroDivisionError), configs.using("down_proj", second):
            assert configs.of("down_proj", 99, 3, x[:, 1:]) == second
            raise ZeroDivisionError
        assert configs.of("down_proj", 16, 0, x) == first
        assert configs.lookup("down_proj", device.family(CPU), "32", 16) == table
        assert configs.of("weight_grad", 16, 0, x) not in (first, second)
    assert configs.of("down_proj", 16, 0, x) == table


# ---- what is tried -------------------------------------------------------------------------------


def test_every_plan_can_be_launched(monkeypatch):
    """Tiles are powers of two from 16 x 16, what tl.dot and the mask need."""
    monkeypatch.setattr(device, "has_descriptors", lambda here: True)
    table = configs.load()
    kinds = set()
    for kernel in configs.KERNELS:
        for width in tune_triton.WIDTHS:
            best = plan_of(table[kernel]["sm90"][width][-1])
            for axis in triton_plans.axes(kernel, width, CPU):
                tried = triton_plans.plans(kernel, axis, best, best, CPU)
                kinds |= {config.kind for config in tried}
                assert best not in tried and len(tried) == len(set(tried))
                for config in tried:
                    sides = {config.rows, config.cols, config.depth, config.rank} - {0}
                    assert all(n >= 16 and n & (n - 1) == 0 for n in sides), config
                    assert config.warps in (4, 8) and config.kind in configs.KINDS
    assert {"persistent", "descriptors"} <= kinds


def test_plans_that_cannot_win_are_not_tried(monkeypatch):
    monkeypatch.setattr(device, "has_descriptors", lambda here: False)
    gemm = plan_of(configs.load()["fused_gemm"]["sm80"]["16"][-1])
    axis = triton_plans.GEMM[0]
    assert [c.kind for c in triton_plans.plans("fused_gemm", axis, gemm, gemm, CPU)] == [
        "persistent"
    ]
    one = plan_of(configs.load()["down_and_weight_grad"]["sm90"]["16"][0])
    (axis, *_) = triton_plans.AXES["down_and_weight_grad", "16"]
    tried = triton_plans.plans("down_and_weight_grad", axis, one, one, CPU)
    assert tried and all(config.rows >= one.rows for config in tried)


# ---- what is measured ----------------------------------------------------------------------------


@interpreted
def test_the_faster_plan_is_written_and_ties_are_not(tune, capsys):
    arguments = ("--kernels", "down_proj")
    before = configs.load()

    def factor(config: Config, _: str) -> float:
        return 0.5 if (config.rows, config.depth, config.warps) == (32, 64, 4) else 1.0

    code, table = tune(factor, *arguments, calls=right)
    assert code == 0, capsys.readouterr().out
    (row,) = table["down_proj"]["interpreter"]["16"]
    assert row == before["down_proj"]["interpreter"]["16"][0] | {"rows": 32}
    assert table["down_proj"]["interpreter"]["32"][0]["rows"] == 32
    for family in FAMILIES:
        assert table["down_proj"][family] == before["down_proj"][family]
        assert table["origin"][family] == before["origin"][family]
    origin = table["origin"]["interpreter"]
    assert torch.__version__ in origin and "commit" in origin
    assert "fused_gemm 16 M <= 16" in origin and origin.endswith("by model, not measured")
    assert "down_proj" not in origin
    code, table = tune(
        lambda config, _: 1.0 if config.rows == 64 else 0.985, *arguments, calls=right
    )
    assert code == 0 and table["down_proj"] == before["down_proj"]


@interpreted
@pytest.mark.parametrize(("slower", "taken"), [(1.2, False), (1.05, True)])
def test_a_plan_has_to_win_in_the_mean_of_all_calls(tune, slower, taken):
    def both(kernel, p, h, dh):
        def forward():
            return composed.down_proj(p.x, p.lora_a, *p.drop, p.scaling)

        def backward():
            return composed.down_proj(p.dy, p.lora_b.t(), None, 0, p.scaling)

        return {"h": forward, "dh": backward}

    def factor(config: Config, call: str) -> float:
        return 1.0 if config.rows == 64 else {"forward": 0.9, "backward": slower}[call]

    code, table = tune(factor, "--kernels", "down_proj", calls=both)
    assert code == 0
    assert (table["down_proj"] != configs.load()["down_proj"]) == taken


@interpreted
def test_what_is_wrong_or_too_large_is_skipped_with_a_line(tune, capsys):
    def calls(kernel, p, h, dh):
        def run():
            config = configs.of(kernel, 16, 0, p.x)
            if config.stages == 5:
                raise OutOfResources(300000, 232448, "shared memory")
            y = right(kernel, p, h, dh)["dh"]()
            return y * torch.nan if config.stages == 4 else y

        return {"dh": run}

    stages = {2: 1.0, 3: 0.9, 4: 0.1, 5: 0.1}
    code, table = tune(lambda c, _: stages[c.stages], "--kernels", "down_proj", calls=calls)
    shown = capsys.readouterr().out
    assert code == 0 and table["down_proj"]["interpreter"]["16"][0]["stages"] == 3, shown
    assert "stages 4 programs 4 grid group 8: dh past the bound of C1" in shown
    assert "OutOfResources: out of resource: shared memory, Required: 300000" in shown


@interpreted
def test_a_wrong_present_plan_ends_the_run(tune, capsys):
    def calls(kernel, p, h, dh):
        return {"dh": lambda: right(kernel, p, h, dh)["dh"]() * 1.5}

    code, table = tune(lambda *_: 1.0, "--kernels", "down_proj", calls=calls)
    assert code == 1 and table is None
    assert "the plan to beat is wrong" in capsys.readouterr().out


@interpreted
def test_what_other_devices_of_the_family_cannot_hold_is_refused(monkeypatch):
    used = SimpleNamespace(metadata=SimpleNamespace(shared=100 << 10))
    monkeypatch.setattr(JITFunction, "run", lambda self: used)

    def calls(kernel, p, h, dh):
        def run():
            JITFunction.run(None)
            return right(kernel, p, h, dh)["dh"]()

        return {"dh": run}

    monkeypatch.setattr(triton_plans, "calls", calls)
    plan = plan_of(configs.load()["down_proj"]["sm80"]["32"][0])
    call = ("down_proj", "dh", plan, 16)
    assert triton_plans.Checks(torch.float32, CPU).objection(*call) is None
    monkeypatch.setattr(device, "family", lambda here: "sm80")
    why = triton_plans.Checks(torch.float32, CPU).objection(*call)
    assert why is not None and why.startswith("102400 bytes of shared memory")


@interpreted
def test_no_time_leaves_the_rows_and_says_so(tune, capsys):
    code, table = tune(lambda config, _: config.rows, "--seconds", "0", calls=right)
    assert code == 0 and "not measured: down_proj 16 r > 0" in capsys.readouterr().out
    assert {k: table[k] for k in configs.KERNELS} == {k: configs.load()[k] for k in configs.KERNELS}


@interpreted
def test_the_kernels_run_in_the_interpreter(monkeypatch, tune, capsys):
    """One other plan of each, judged by what it computes."""
    some = {
        "down_proj": (("rows", "depth"), ((32, 32),)),
        "fused_gemm": (("kind",), (("grid",), ("persistent",), ("descriptors",))),
        "weight_grad": (("rows", "cols"), ((32, 32),)),
        "down_and_weight_grad": (("rows", "cols"), ((128, 32),)),
    }
    monkeypatch.setattr(tune_triton, "WIDTHS", {"16": tune_triton.WIDTHS["16"]})
    monkeypatch.setattr(triton_plans, "axes", lambda kernel, width, here: [some[kernel]])
    code, table = tune(lambda *_: 1.0, "--dry-run")
    shown = capsys.readouterr().out
    assert code == 0 and table is None and "wrote nothing" in shown
    assert "skipped" not in shown and "not measured" not in shown


# ---- where it runs -------------------------------------------------------------------------------


def test_without_a_gpu_it_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "interpreted", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tune_triton"])
    assert tune_triton.main() == 1
    assert "torch sees no GPU; with TRITON_INTERPRET=1" in capsys.readouterr().out
    monkeypatch.setattr(device, "interpreted", lambda: True)
    assert tune_triton.main() == 1
    assert "it needs a GPU, or --dry-run" in capsys.readouterr().out
    assert tune_triton.device_here(True) == CPU
