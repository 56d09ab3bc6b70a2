"""The benchmark's commands on a tiny problem: they run, and record what they measured."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_kernels import composed

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import bench_backward, bench_decode, bench_gemm, contenders, profiles  # noqa: E402
from bench.shapes import Case, Shape  # noqa: E402


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


def test_relative_error_of_several_results_is_the_worst_and_keeps_nan():
    exact = (torch.ones(4), torch.ones(3))
    assert contenders.relative_error((torch.ones(4), torch.ones(3) * 1.5), exact) == 0.5
    for place in range(2):
        got = [t.clone() for t in exact]
        got[place][1] = torch.nan
        assert math.isnan(contenders.relative_error(tuple(got), exact))


# ---- bench_gemm ----------------------------------------------------------------------------------


def right(*args):
    """forward_as by composed, whatever the form and the tile."""
    return composed.forward(*args[:-3])


def no_dropout(x, weight, a, b, bias, seed, threshold, *more):
    return right(x, weight, a, b, bias, None, 0, *more)


def nan_in_h(*args):
    y, h = right(*args)
    return y, h * torch.nan


def lora_in_plain(x, weight, a, b, *more):
    y, h = right(x, weight, a, b, *more)
    return (y if b.shape[1] else y + 1), h


def fails(*args):
    raise RuntimeError("fused_gemm [24, 32]: too many resources")


def plan(x, weight, a, b, seed, form, tile_n, group):
    """forward_plan of a kernel that serves one_launch up to rank 4, and tiles but for 192."""
    if form == "one_launch" and a.shape[0] > 4:
        raise RuntimeError("forward_plan: one_launch [serves] ranks up to 4\nnot more")
    if tile_n == 192:
        raise RuntimeError("forward_plan: no tile 192")
    return f"form={form} r={a.shape[0]} tile=128x{tile_n or 256} [group {group}]"


class FakeTimer:
    """A millisecond of vendor, and what each of ours takes by form, more for another tile."""

    MS = {"": 2.0, "one_launch": 3.0, "two_launches": 5.0}  # noqa: RUF012

    def __call__(self, call) -> float:
        call()
        if not isinstance(call, functools.partial):
            return 1.0 if call.__name__ == "vendor" else 10.0
        form, tile_n, _ = call.args[-3:]
        return self.MS[form] + tile_n / 128


@pytest.fixture
def gemm(monkeypatch, tmp_path):
    """Runs bench_gemm with a made-up kernel: (exit code, its JSON)."""
    ops = torch.ops.lora_kernels

    def run(forward_as, *arguments: str) -> tuple[int, dict]:
        monkeypatch.setattr(ops, "forward_as", forward_as, raising=False)
        monkeypatch.setattr(ops, "forward_plan", plan, raising=False)
        monkeypatch.setattr(bench_gemm.schemas, "runs_here", lambda op, device: True)
        monkeypatch.setattr(bench_gemm.timing, "make_timer", lambda device: FakeTimer())
        out = tmp_path / "gemm.json"
        common = ["--shape", "16,24,32", "--rounds", "3", "--device", "cpu", "--json", str(out)]
        monkeypatch.setattr(sys, "argv", ["bench_gemm", *common, *arguments])
        return bench_gemm.main(), json.loads(out.read_text())

    return run


def rows_of(group: dict) -> dict[str, dict]:
    return {row["name"]: row for row in group["rows"]}


def test_gemm_says_what_lora_adds_and_what_is_not_served(gemm, capsys):
    code, result = gemm(right, "--rank", "4,8")
    shown = capsys.readouterr().out
    assert code == 0 and not result["failures"], shown
    tables = {(g["rank"], g["dropout"]): rows_of(g) for g in result["groups"]}
    assert set(tables) == {(4, 0.0), (4, 0.1), (8, 0.0), (8, 0.1)}
    assert list(tables[4, 0.1]) == [
        "vendor", "plain", "one_launch", "two_launches", "addmm", "eager",
    ]  # fmt: skip
    for rows in tables.values():
        for name, (over_plain, over_vendor) in {
            "vendor": (0.5, 1), "plain": (1, 2), "two_launches": (2.5, 5), "addmm": (5, 10),
        }.items():  # fmt: skip
            row = rows[name]
            assert (row["over_plain"], row["over_vendor"]) == (over_plain, over_vendor)
            assert row["tflops"] == pytest.approx(2 * 16 * 24 * 32 / (over_vendor * 1e9))
        assert rows["plain"]["plan"] == "form= r=0 tile=128x256 [group 0]"
    assert tables[4, 0.0]["one_launch"]["over_plain"] == 1.5
    assert "one_launch" not in tables[8, 0.0]
    left_out = [group["left_out"] for group in result["groups"] if group["rank"] == 8]
    why = {"one_launch": "forward_plan: one_launch [serves] ranks up to 4"}
    assert left_out == [why, why]
    assert shown.count("one_launch: left out: forward_plan: one_launch [serves]") == 1
    assert shown.count("two_launches: form=two_launches r=8 tile=128x256 [group 0]") == 2
    (mean,) = (
        row for row in result["summary"]
        if (row["name"], row["rank"], row["dropout"]) == ("one_launch", 4, 0.1)
    )  # fmt: skip
    assert mean["tables"] == 1
    assert (mean["over_plain"], mean["over_vendor"]) == pytest.approx((1.5, 3.0))


def test_gemm_sweeps_tiles_each_over_its_own_plain(gemm):
    sweep = ("--tile-n", "128,192,256", "--group", "8", "--rank", "4", "--dropout", "0.1")
    code, result = gemm(right, *sweep)
    assert code == 0
    (group,) = result["groups"]
    rows = rows_of(group)
    over = {name: row["over_plain"] for name, row in rows.items() if "plan" in row}
    assert over == {
        "plain tile_n=128 group=8": 1, "one_launch tile_n=128 group=8": 4 / 3,
        "two_launches tile_n=128 group=8": 2, "plain tile_n=256 group=8": 1,
        "one_launch tile_n=256 group=8": 5 / 4, "two_launches tile_n=256 group=8": 7 / 4,
    }  # fmt: skip
    assert rows["addmm"]["over_plain"] is None
    assert len(group["left_out"]) == 3 and all("tile_n=192" in name for name in group["left_out"])


def assert_only_bad_ones_fail(result: dict, bad: set, why: str) -> None:
    """Rows of these names and dropouts have an error instead of a time, and no other row has."""
    found = {
        (row["name"], group["dropout"]): row
        for group in result["groups"]
        for row in group["rows"]
        if "error" in row
    }
    assert set(found) == bad and len(result["failures"]) == len(bad)
    assert all(why in row["error"] and "median_ms" not in row for row in found.values())


@pytest.mark.parametrize(
    ("forward_as", "bad", "why"),
    [
        (no_dropout, {("one_launch", 0.1), ("two_launches", 0.1)}, "wrong"),
        (lora_in_plain, {("plain", 0.0), ("plain", 0.1)}, "wrong"),
        (nan_in_h, {(form, p) for form in bench_gemm.FORMS for p in (0.0, 0.1)}, "wrong"),
        (fails, {(name, p) for name in bench_gemm.OURS for p in (0.0, 0.1)}, "too many"),
    ],
)
def test_gemm_times_nothing_that_is_wrong(gemm, forward_as, bad, why):
    code, result = gemm(forward_as, "--rank", "4")
    assert code == 1
    assert_only_bad_ones_fail(result, bad, why)


def test_gemm_without_our_kernels(tmp_path):
    out = tmp_path / "gemm.json"
    done = run(
        "bench.bench_gemm", "--shape", "16,24,32", "--rank", "4", "--rounds", "3", "--device",
        "cpu", "--json", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for group in json.loads(out.read_text())["groups"]:
        rows = rows_of(group)
        assert set(rows) >= {"vendor", "addmm", "eager"}
        assert all(row["median_ms"] > 0 for row in rows.values())


def test_gemm_shapes_fill_a_gpu_evenly_and_unevenly_within_the_suite_s_limit():
    cases = bench_gemm.default_cases("cuda", 16)
    waves = [case.shape.m / 128 * case.shape.n / 256 / 132 for case in cases]
    even = [wave == int(wave) for wave in waves]
    assert any(even) and not all(even) and max(waves) > 20 and min(waves) < 4
    for stage, ranks in (("gemm", bench_gemm.RANKS), ("backward", bench_backward.RANKS)):
        tables = len(cases) * len(ranks.split(",")) * 2  # dropouts
        assert tables * bench_gemm.SECONDS["cuda"] < profiles.LIMITS[stage] / 2


def test_a_row_has_what_its_plan_expects():
    said = "dx 128x256; 4.5 % over the frozen GEMM of dx by the model"
    assert bench_gemm.planned(said) == {"plan": said, "predicted_over_plain": 1.045}
    said = "h in turns; LoRA term 12.0 % over the frozen GEMM by the model"
    assert bench_gemm.planned(said)["predicted_over_plain"] == pytest.approx(1.12)
    assert bench_gemm.planned("dx 128x256") == {"plan": "dx 128x256"}


# ---- bench_backward ------------------------------------------------------------------------------


def right_backward(*args):
    """backward_as by composed, whatever the form and the tile."""
    return composed.backward(*args[:-3])


def no_dropout_in_dx(*args):
    return (right_backward(*args[:6], None, 0, *args[8:])[0], *right_backward(*args)[1:])


def nan_in_db(*args):
    dx, da, db, dbias = right_backward(*args)
    return dx, da, db * torch.nan, dbias


def backward_plan(x, weight, a, b, seed, form, tile_n, group):
    """backward_plan of kernels that serve one_grid up to rank 4 and in tiles but for 192."""
    if form == "one_grid" and (a.shape[0] > 4 or tile_n == 192):
        raise RuntimeError("backward: not served: r is more than 4\nnor 192")
    dx = f"dx r={a.shape[0]} tile=128x{tile_n or 256}"
    return f"{form} ({dx}); 4.5 % over the frozen GEMM of dx" if form else dx


class FakeBackwardTimer:
    """A millisecond of vendor, and what each of ours takes by form, more for another tile."""

    MS = {"": 2.0, "passes": 5.0, "one_grid": 3.0}  # noqa: RUF012

    def __call__(self, call) -> float:
        call()
        if not isinstance(call, functools.partial):
            return 1.0 if call.__name__ == "vendor" else 10.0
        form, tile_n, _ = call.args[-3:]
        return self.MS[form] + tile_n / 128 if isinstance(form, str) else 0.5


@pytest.fixture
def backward(monkeypatch, tmp_path):
    """Runs bench_backward with a made-up kernel: (exit code, its JSON)."""
    ops = torch.ops.lora_kernels

    def run(backward_as, *arguments: str) -> tuple[int, dict]:
        monkeypatch.setattr(ops, "backward_as", backward_as, raising=False)
        monkeypatch.setattr(ops, "backward_plan", backward_plan, raising=False)
        monkeypatch.setattr(bench_gemm.schemas, "runs_here", lambda op, device: True)
        monkeypatch.setattr(bench_gemm.timing, "make_timer", lambda device: FakeBackwardTimer())
        out = tmp_path / "backward.json"
        common = ["--shape", "16,24,32", "--rounds", "3", "--device", "cpu", "--json", str(out)]
        monkeypatch.setattr(sys, "argv", ["bench_backward", *common, *arguments])
        return bench_backward.main(), json.loads(out.read_text())

    return run


def test_backward_says_what_gradients_add_and_what_is_not_served(backward, capsys):
    code, result = backward(right_backward, "--rank", "4,8")
    shown = capsys.readouterr().out
    assert code == 0 and not result["failures"], shown
    tables = {(g["rank"], g["dropout"]): rows_of(g) for g in result["groups"]}
    assert set(tables) == {(4, 0.0), (4, 0.1), (8, 0.0), (8, 0.1)}
    assert list(tables[4, 0.1]) == [
        "vendor", "plain", "passes", "one_grid", *bench_backward.PARTS, "composed", "eager",
    ]  # fmt: skip
    for rows in tables.values():
        for name, (over_plain, over_vendor) in {
            "vendor": (0.5, 1), "plain": (1, 2), "passes": (2.5, 5), "dy_x_alone": (2.5, 5),
            "x_alone": (0.25, 0.5), "dx_alone": (0.25, 0.5), "composed": (5, 10), "eager": (5, 10),
        }.items():  # fmt: skip
            row = rows[name]
            assert (row["over_plain"], row["over_vendor"]) == (over_plain, over_vendor)
            assert row["tflops"] == pytest.approx(2 * 16 * 24 * 32 / (over_vendor * 1e9))
        assert rows["plain"]["plan"] == "dx r=0 tile=128x256"
        assert {n for n, row in rows.items() if "plan" in row} <= set(bench_backward.OURS)
        assert {n for n, row in rows.items() if "predicted_over_plain" in row} == {
            n for n in bench_backward.FORMS if n in rows
        }
    assert tables[4, 0.0]["one_grid"]["over_plain"] == 1.5
    left_out = [group["left_out"] for group in result["groups"] if group["rank"] == 8]
    why = {"one_grid": "backward: not served: r is more than 4"}
    assert left_out == [why, why]
    assert shown.count("one_grid: left out: backward: not served") == 1
    (mean,) = (
        row for row in result["summary"]
        if (row["name"], row["rank"], row["dropout"]) == ("one_grid", 4, 0.1)
    )  # fmt: skip
    assert (mean["over_plain"], mean["predicted_over_plain"]) == pytest.approx((1.5, 1.045))


def test_backward_sweeps_tiles_and_times_its_parts_once(backward):
    sweep = ("--tile-n", "128,192,256", "--rank", "4", "--dropout", "0.1")
    code, result = backward(right_backward, *sweep)
    assert code == 0
    (group,) = result["groups"]
    over = {row["name"]: row["over_plain"] for row in group["rows"] if "plan" in row}
    assert over == {
        "plain tile_n=128": 1, "passes tile_n=128": 2, "one_grid tile_n=128": 4 / 3,
        "plain tile_n=192": 1, "passes tile_n=192": 6.5 / 3.5,
        "plain tile_n=256": 1, "passes tile_n=256": 7 / 4, "one_grid tile_n=256": 5 / 4,
    }  # fmt: skip
    assert list(group["left_out"]) == ["one_grid tile_n=192"]
    names = [row["name"] for row in group["rows"]]
    assert len(names) == len(set(names)) and set(bench_backward.PARTS) <= set(names)


WITH_LORA = ("passes", "one_grid", "dy_x_alone")


@pytest.mark.parametrize(
    ("backward_as", "bad", "why"),
    [
        (no_dropout_in_dx, {(form, 0.1) for form in bench_backward.FORMS}, "wrong"),
        (nan_in_db, {(name, p) for name in WITH_LORA for p in (0.0, 0.1)}, "wrong"),
        (fails, {(name, p) for name in ("plain", *WITH_LORA) for p in (0.0, 0.1)}, "too many"),
    ],
)
def test_backward_times_nothing_that_is_wrong(backward, backward_as, bad, why):
    code, result = backward(backward_as, "--rank", "4")
    assert code == 1
    assert_only_bad_ones_fail(result, bad, why)


def test_backward_without_our_kernels(tmp_path):
    out = tmp_path / "backward.json"
    done = run(
        "bench.bench_backward", "--shape", "16,24,32", "--rank", "4", "--rounds", "3", "--device",
        "cpu", "--json", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for group in json.loads(out.read_text())["groups"]:
        rows = rows_of(group)
        assert set(rows) >= {"vendor", "composed", "eager"}
        assert all(row["median_ms"] > 0 for row in rows.values())


def test_backward_compares_what_computes_the_same():
    shape = bench_gemm.shapes.Shape("s", 16, 24, 32)
    case = bench_gemm.Case(shape, "fp32", 4)
    with torch.no_grad():
        layer = bench_backward.Layer(contenders.make_problem(case, "cpu"), 0.0)
    dx, da, db, _ = layer.composed()
    for got, want in zip(layer.eager(), (dx, da, db), strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(layer.vendor(), layer.dy @ layer.weight)


# ---- bench_decode --------------------------------------------------------------------------------


def test_decode_looks_at_another_copy_of_the_weight_each_time(gemm, monkeypatch):
    """So many that none is still in a cache when its turn comes again."""
    monkeypatch.setattr(bench_decode, "COLD_BYTES", 5 * 24 * 32 * 2)
    case = Case(Shape("", 16, 24, 32), "bf16", 4)
    layer = bench_decode.Layer(contenders.make_problem(case, "cpu"), 0.0)
    seen = [layer.weight for _ in range(10)]
    assert len({w.data_ptr() for w in seen}) == 5 and seen[0] is seen[5]
    assert all(torch.equal(w, seen[0]) for w in seen)


def test_decode_times_its_form_over_the_vendor(gemm, monkeypatch, capsys):
    monkeypatch.setattr(FakeTimer, "MS", FakeTimer.MS | {"decode": 1.05})
    monkeypatch.setattr(bench_gemm, "main", bench_decode.main)
    code, result = gemm(right, "--rank", "4", "--dropout", "0")
    assert code == 0, capsys.readouterr().out
    rows = rows_of(result["groups"][0])
    assert rows["decode"]["over_vendor"] == 1.05 and "one_launch" not in rows
    assert rows["decode"]["weight_gb_per_s"] == pytest.approx(24 * 32 * 4 / 1.05e-3 * 1e-9)
