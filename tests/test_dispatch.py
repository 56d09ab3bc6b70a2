"""The automatic choice by shape: classes, the shipped table and its evidence, lookup, explain."""

from __future__ import annotations

import json
from dataclasses import replace

import problems
import pytest
import torch
from dispatch_facts import BOX, DATE, EMPTY, GPU, INSIDE, WRONG, on_gpu, points, record

import lora_kernels as lk
from lora_kernels import backend as backends
from lora_kernels import composed, dispatch, machine, ops, schemas, shape_classes, verdicts
from lora_kernels.selfcheck import SHAPES
from lora_kernels.shape_classes import EDGES, Point, classes
from lora_kernels.triton_kernels import digest

BF16 = torch.bfloat16
CPU = torch.device("cpu")

# ---- classes -------------------------------------------------------------------------------------


def test_a_class_needs_its_corners_and_is_won_at_every_point():
    corners = points()
    found = classes(corners)
    assert len(found) == 4 and all(c.won and len(c.points) == 16 for c in found)
    for i in range(0, len(corners), 7):
        assert len(classes([*corners[:i], *corners[i + 1 :]])) == 3, "one corner less"
    kind = (False, "bfloat16", "training")
    slow = Point(2048, 2048, 2048, 32, *kind, 2.0, 2.0, right=True)
    assert [c.won for c in classes([*corners, slow])].count(False) == 1
    outside = slow._replace(m=4097)
    unaligned = slow._replace(n=2049)
    for other in (outside, unaligned):
        assert all(c.won for c in classes([*corners, other])), "it lies in no class"
    wrong = slow._replace(ours_ms=1.0, right=False)
    assert [c.won for c in classes([*corners, wrong])].count(False) == 1


@pytest.mark.parametrize(("ratio", "won"), [(0.98, True), (0.995, False), (1.0, False)])
def test_a_tie_is_no_win(ratio, won):
    assert {c.won for c in classes(points(lambda *sizes: ratio))} == {won}


def test_neighbouring_classes_share_the_points_between_them():
    both = points(box=((256, 1024, 4096), *BOX[1:]), passes=["forward"], dropouts=[False])
    assert [c.m for c in classes(both)] == [(256, 1024), (1024, 4096)]
    assert all(list(edges) == sorted(set(edges)) for edges in EDGES.values())


# ---- lookup --------------------------------------------------------------------------------------


def evidence(*found: Point, table: dict = EMPTY, checks=(), **more) -> dispatch.Evidence:
    verdict = record(found, checks) if found or checks else None
    return dispatch.evaluate(GPU, table, verdict, **more)


def shipped(found: list[Point], gpu: machine.Machine = GPU, backend: str = "cuda") -> dict:
    about = {key: getattr(gpu, key) for key in ("device", "capability", "sources", "torch", "cuda")}
    place = {"folder": "bench/results/cuda-test", "commit": "abcdef"}
    about |= {"backend": backend, "evidence": place}
    both = [dispatch.row_of(c, about) for c in classes(found)], classes(found)
    rows = [row for row, c in zip(*both, strict=True) if c.won]
    slower = [row for row, c in zip(*both, strict=True) if not c.won]
    return {"schema": dispatch.SCHEMA, "rows": rows, "slower": slower}


def test_a_row_comes_back_as_its_class():
    for found in classes(points(lambda m, n, k, r: m / 9000)):
        row = json.loads(json.dumps(dispatch.row_of(found, {})))
        assert dispatch.class_of(row) == found


@pytest.mark.parametrize("from_table", [True, False])
def test_what_is_inside_is_taken_and_nothing_else(from_table):
    won = points(dropouts=[False], passes=["training"])
    known = evidence(table=shipped(won)) if from_table else evidence(*won)
    assert known.steers(BF16) and not known.steers(torch.float16)
    found = known.find(BF16, INSIDE)
    assert found.won and "0.500 of composed's time" in found.why
    assert ("bench/results/cuda-test of commit abcdef" if from_table else DATE) in found.why
    for change in (
        dict(m=1023), dict(m=4097), dict(n=512), dict(k=8192), dict(r=8), dict(r=65), dict(n=2052),
        dict(k=2049), dict(dropout=True), dict(training=False),
    ):  # fmt: skip
        other = known.find(BF16, INSIDE._replace(**change))
        assert not other.won and "no measured class holds" in other.why, change
    assert not known.find(torch.float16, INSIDE).won


@pytest.mark.parametrize("field", ["device", "capability", "sources"])
def test_a_row_of_another_device_or_other_kernels_does_not_count(field):
    other = GPU._replace(**{field: "other"})
    known = dispatch.evaluate(GPU, shipped(points(), other))
    assert not known.steers(BF16)
    assert known.find(BF16, INSIDE).why == dispatch.NOTHING + verdicts.REMEDY
    assert "evidence" in dispatch.NOTHING


@pytest.mark.parametrize(("name", "other"), [("cuda", "triton"), ("triton", "cuda")])
def test_a_row_counts_for_its_own_backend_alone(name, other):
    """Even if their kernels had one hash."""
    table = shipped(points(), backend=other)
    known = dispatch.evaluate(GPU, table, backend=name)
    assert not known.steers(BF16)
    assert known.find(BF16, INSIDE).why == dispatch.NOTHING + verdicts.remedy(name)
    assert dispatch.evaluate(GPU, table, backend=other).find(BF16, INSIDE).won
    slower = shipped(points(lambda *sizes: 2.0), backend=other)
    known = dispatch.evaluate(GPU, slower, record(points(), backend=name), backend=name)
    assert known.find(BF16, INSIDE).won


def test_a_row_of_triton_lapses_with_its_kernels_and_with_triton(tmp_path):
    kernel = tmp_path / "kernel.py"
    kernel.write_text("before")
    here, upgraded = (
        GPU._replace(sources=digest.of_version(version, tmp_path)) for version in ("3.7.1", "3.8.0")
    )
    kernel.write_text("before  # and a comment")
    changed = GPU._replace(sources=digest.of_version("3.7.1", tmp_path))
    table = shipped(points(dtype="float32"), here, "triton")
    assert dispatch.evaluate(here, table, backend="triton").find(torch.float32, INSIDE).won
    for stale in (upgraded, changed):
        known = dispatch.evaluate(stale, table, backend="triton")
        assert not known.steers(torch.float32)
        assert "selfcheck --backend triton" in known.find(torch.float32, INSIDE).why


def test_other_versions_leave_a_shipped_row_in_force():
    known = dispatch.evaluate(GPU, shipped(points(), GPU._replace(torch="2.11", driver="0")))
    assert "torch 2.11" in known.find(BF16, INSIDE).why


def test_where_composed_is_faster_the_measured_times_are_quoted():
    slow = points(lambda m, n, k, r: 1.25 if m == 1024 else 0.5)
    for known in (evidence(*slow), evidence(table=shipped(slow))):
        found = known.find(BF16, INSIDE)
        assert not known.steers(BF16) and not found.won
        assert "composed is faster: 2.5 ms against composed's 2 ms at M=1024" in found.why


def test_the_verdict_is_asked_after_the_table():
    wide = points(box=((4096, 16384), *BOX[1:]))
    known = evidence(*wide, table=shipped(points()))
    assert "shipped evidence" in known.find(BF16, INSIDE).why
    assert "your verdict" in known.find(BF16, INSIDE._replace(m=8192)).why
    slow = evidence(*points(), table=shipped(points(lambda *sizes: 2.0)))
    assert slow.find(BF16, INSIDE).won, "what the user measured here counts"


def test_a_wrong_kernel_forbids_even_what_a_row_allows():
    for found, checks in (((), (WRONG,)), (points(right=False), ())):
        known = evidence(*found, table=shipped(points()), checks=checks)
        assert not known.steers(BF16) and not known.find(BF16, INSIDE).won
        assert "a kernel is wrong on this device" in known.find(BF16, INSIDE).why


def test_a_library_without_kernels_has_no_evidence():
    here = GPU._replace(sources="")
    known = dispatch.evaluate(here, shipped(points(), here), record(points(), machine=here))
    assert not known.steers(BF16) and "built without them" in known.find(BF16).why
    known = dispatch.evaluate(here, shipped(points(), here, "triton"), backend="triton")
    assert not known.steers(BF16) and "Triton is not installed" in known.find(BF16).why


def test_a_reason_not_to_use_a_verdict_is_passed_on():
    assert "because" in evidence(ignored="because").find(BF16, INSIDE).why


def test_a_verdict_of_one_rank_alone_is_ignored(monkeypatch):
    known = evidence(*points())
    shared = evidence(*points(), shared=True)
    monkeypatch.setattr(dispatch, "many_ranks", lambda: True)
    assert not known.find(BF16, INSIDE).won
    assert "share_verdicts" in known.find(BF16, INSIDE).why
    assert shared.find(BF16, INSIDE).won and "rank 0" in shared.find(BF16, INSIDE).why
    assert evidence(table=shipped(points())).find(BF16, INSIDE).won
    bad = evidence(checks=(WRONG,), table=shipped(points()))
    assert not bad.find(BF16, INSIDE).won, "that a kernel is wrong is never ignored"


# ---- the call ------------------------------------------------------------------------------------

SMALL = ((16, 64), (256, 1024), (256, 1024), (4, 16))


class Toy:
    """A backend with measured evidence, on the CPU: composed, with a list of its calls."""

    def __init__(self, known: dispatch.Evidence):
        self.calls: list[str] = []
        self.known = known

        def run(name, function):
            def counted(*args):
                self.calls.append(name)
                return function(*args)

            return counted

        backends.register(
            lk.Backend(
                "toy", "a test", run("forward", composed.forward),
                run("backward", composed.backward), evidence=lambda device: self.known,
            ),
            before="cpu",
        )  # fmt: skip

    def learn(self, known: dispatch.Evidence) -> None:
        self.known = known
        dispatch.reload()


@pytest.fixture
def toy():
    found = Toy(evidence(*points(box=SMALL, dtype="float32", dropouts=[False])))
    yield found
    backends.unregister("toy")


def call(shape=(32, 256, 512, 8), p: float = 0.0, grad: bool = True, **more) -> torch.Tensor:
    problem = problems.make(shape, dropout_p=p)
    x = problem.x.requires_grad_(grad)
    y = lk.fused_lora_linear(x, problem.weight, problem.lora_a, problem.lora_b, dropout_p=p, **more)
    if grad and torch.is_grad_enabled():
        y.backward(problem.dy)
    return y


def test_forward_and_backward_of_a_call_take_the_same_backend(toy):
    call()
    assert toy.calls == ["forward", "backward"]
    for outside in (dict(shape=(65, 256, 512, 8)), dict(p=0.1), dict(shape=(32, 256, 516, 8))):
        call(**outside)
    call(scaling=0.0)
    assert toy.calls == ["forward", "backward"], "composed serves what was not won"


def test_inference_and_training_are_decided_apart(toy):
    toy.learn(evidence(*points(box=SMALL, dtype="float32", passes=["training"])))
    with torch.no_grad():
        call()
    call(grad=False)
    assert toy.calls == []
    toy.learn(evidence(*points(box=SMALL, dtype="float32", passes=["forward"])))
    call()
    assert toy.calls == []
    with torch.no_grad():
        call()
    call(grad=False)
    assert toy.calls == ["forward"] * 2


@pytest.mark.parametrize("training", [True, False])
def test_compiled_code_decides_as_eager_code_does(toy, training):
    passes = ["training"] if training else ["forward"]
    toy.learn(evidence(*points(box=SMALL, dtype="float32", passes=passes)))
    p = problems.make((32, 256, 512, 8))
    compiled = torch.compile(lk.fused_lora_linear, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        x = p.x.clone().requires_grad_()
        y = compiled(x, p.weight, p.lora_a, p.lora_b)
        assert toy.calls == ["forward"]
        if training:
            y.backward(p.dy)
            assert toy.calls == ["forward", "backward"]
    toy.learn(evidence())
    compiled(p.x, p.weight, p.lora_a, p.lora_b)
    assert toy.calls == (["forward", "backward"] if training else ["forward"])


def test_a_group_goes_where_each_of_its_projections_would(toy):
    def group(*widths: int) -> None:
        parts = [problems.make((32, n, 512, 8)) for n in widths]
        lists = ([getattr(p, name) for p in parts] for name in ("weight", "lora_a", "lora_b"))
        x = parts[0].x.requires_grad_()
        ys = lk.fused_lora_linear_group(x, *lists, scalings=1.0)
        sum(y.sum() for y in ys).backward()

    group(256, 1024)
    assert toy.calls == ["forward", "forward", "backward", "backward"]
    group(256, 2048)
    assert len(toy.calls) == 4


def test_shapes_are_not_looked_at_where_none_was_won(toy, monkeypatch):
    toy.learn(evidence(*points(lambda *sizes: 2.0, box=SMALL, dtype="float32")))

    def never(*args):
        raise AssertionError("per-shape work without evidence")

    monkeypatch.setattr(ops, "call_of", never)
    call()
    assert toy.calls == []


def test_a_new_verdict_drops_what_was_chosen_before(toy):
    call()
    toy.learn(evidence())
    call()
    assert toy.calls == ["forward", "backward"]
    toy.learn(evidence(*points(box=SMALL, dtype="float32")))
    call(p=0.1)
    assert len(toy.calls) == 4


def test_ranks_that_appear_later_are_noticed(toy, monkeypatch):
    call()
    monkeypatch.setattr(dispatch, "many_ranks", lambda: True)
    call()
    assert toy.calls == ["forward", "backward"]


def test_explain_says_where_the_choice_comes_from(toy):
    p = problems.make((32, 256, 512, 8))
    args = (p.x.requires_grad_(), p.weight, p.lora_a, p.lora_b)
    found = lk.explain(*args)
    assert found.backend == "toy" and DATE in found.reason and "points measured" in found.reason
    found = lk.explain(*args, dropout_p=0.1)
    assert found.backend != "toy" and "no measured class holds M=32" in found.passed_over["toy"]
    assert "with dropout, training" in found.passed_over["toy"]
    with torch.no_grad():
        assert "0.500" in lk.explain(*args).reason
    toy.learn(evidence(*points(lambda *sizes: 1.5, box=SMALL, dtype="float32")))
    assert "composed is faster: 3 ms" in lk.explain(*args).passed_over["toy"]


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Backends cuda and triton as they are registered, but composed serves them, here on a CPU."""
    monkeypatch.setenv(verdicts.ENV, str(tmp_path / "cache"))
    monkeypatch.setattr(verdicts, "_warned", set())
    monkeypatch.setattr(machine, "of", on_gpu)
    for name in dispatch.MEASURED:
        known = backends._REGISTRY[name].evidence
        stand_in = lk.Backend(name, "a test", composed.forward, composed.backward, evidence=known)
        monkeypatch.setitem(backends._REGISTRY, name, stand_in)
    monkeypatch.setitem(
        backends._REGISTRY, "cpu", replace(backends._REGISTRY["cpu"], missing=lambda: "a test")
    )
    dispatch.reload()
    yield
    monkeypatch.undo()
    dispatch.reload()


def learn(backend: str, checks=(), **about) -> None:
    found = points(box=SMALL, dtype="float32", **about)
    verdicts.save(record(found, checks, on_gpu(None, backend), backend))
    dispatch.reload()


def explained() -> lk.Explanation:
    p = problems.make((32, 256, 512, 8))
    return lk.explain(p.x.requires_grad_(), p.weight, p.lora_a, p.lora_b)


def test_explain_says_of_triton_what_it_says_of_cuda(measured):
    found = explained()
    assert found.backend == "composed" and not backends.by_shape(CPU, torch.float32)
    for name in dispatch.MEASURED:
        assert found.passed_over[name] == dispatch.NOTHING + verdicts.remedy(name)
    learn("triton")
    found = explained()
    assert found.backend == "triton" and backends.by_shape(CPU, torch.float32)
    assert "0.500 of composed's time" in found.reason and "-triton.json of " in found.reason
    assert found.passed_over["cuda"] == dispatch.NOTHING + verdicts.REMEDY
    learn("triton", ratio=lambda *sizes: 1.5)
    assert explained().backend == "composed"
    assert "composed is faster: 3 ms" in explained().passed_over["triton"]


def test_cuda_comes_before_triton_and_each_falls_alone(measured):
    learn("triton")
    learn("cuda")
    found = explained()
    assert found.backend == "cuda"
    assert found.passed_over["triton"] == "comes after cuda in the fixed order"
    with pytest.warns(verdicts.VerdictWarning, match="backend 'cuda' is out"):
        learn("cuda", [WRONG])
        found = explained()
    assert found.backend == "triton" and "a kernel is wrong" in found.passed_over["cuda"]
    learn("cuda", [WRONG._replace(status="right", usage=0.1, note="")])
    with pytest.warns(verdicts.VerdictWarning, match="backend 'triton' is out"):
        learn("triton", [WRONG])
        assert not dispatch.evidence(CPU, "triton").steers(torch.float32)
        assert explained().backend == "cuda"


def test_measured_backends_wait_for_evidence():
    assert {n for n, b in backends._REGISTRY.items() if b.evidence} == set(dispatch.MEASURED)
    assert backends._REGISTRY["cuda"].evidence is dispatch.evidence
    of_triton = backends._REGISTRY["triton"].evidence
    assert of_triton.func is dispatch.evidence and of_triton.keywords == {"backend": "triton"}
    assert schemas.has_kernel("forward", "CUDA") or not machine.sources()


def test_classes_are_those_that_the_default_shapes_measure():
    for name, shapes in SHAPES.items():
        found = [Point(*s, False, "bfloat16", "forward", 1.0, 2.0, right=True) for s in shapes]
        assert len(shapes) == len(set(shapes)) and classes(found), name
        covered = {p for c in classes(found) for p in c.points}
        assert covered == set(found), f"{name} measures what makes no class"
    assert shape_classes.WON < 1
