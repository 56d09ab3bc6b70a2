"""Several processes against one: the op on DTensors, DDP, FSDP2, tensor parallelism, all on gloo.

tests/distributed_worker.py is started once and runs every check; here its results are compared with
those of this process. The op's are compared bit for bit, on problems whose sums are exact.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import distributed_cases as cases
import pytest
import torch
import torch.distributed as dist
from distributed_cases import SEED, Model, Seeded, loss_of, mean_of_shards
from pages import table_of

import lora_kernels as lk
from lora_kernels import dropout

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import communication

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo"),
    pytest.mark.xdist_group("distributed"),
]
WORLDS = (2, 4)
BARE = [c for c in cases.CASES if c.p == 0 and not c.adapters]
CLOSE = 1e-5  # relative, in norm: sums in another order; another mask is of order 1
CLOSE_BF16 = 2e-2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(world, rank) -> what that rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    worker = Path(__file__).with_name("distributed_worker.py")
    command = [sys.executable, str(worker), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        (world, rank): torch.load(folder / f"{world}_{rank}.pt", weights_only=False)
        for world in WORLDS
        for rank in range(world)
    }


def of_all(ranks, world: int, name: str) -> list:
    found = [ranks[world, rank][name] for rank in range(world)]
    for rank, result in enumerate(found):
        assert not isinstance(result, str), f"rank {rank}: {result}"
    return found


def assert_same(found: dict, expected: dict) -> None:
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def assert_close(found: dict, expected: dict, bound: float = CLOSE) -> None:
    assert len(expected) > 0
    for name, value in expected.items():
        off = (found[name].float() - value.float()).norm() / value.float().norm()
        assert off <= bound, (name, float(off))


def both_worlds(test):
    each = [(2, c) for c in cases.CASES] + [(4, c) for c in cases.CASES_2D]
    ids = [f"{world}ranks-{case}" for world, case in each]
    return pytest.mark.parametrize("world, case", each, ids=ids)(test)


# ---- the op --------------------------------------------------------------------------------------


@both_worlds
def test_the_op_on_dtensors(ranks, world, case):
    for backend in cases.BACKENDS:
        expected = cases.alone(case, backend)
        for found in of_all(ranks, world, f"op {case} {backend}"):
            assert_same(found, expected)
            assert found["kept"], "a leaf's gradient has the leaf's placements"


@both_worlds
def test_the_mask_is_that_of_the_whole_matrix(ranks, world, case):
    expected = lk.dropout_mask(SEED, (*case.lead, cases.K), cases.P)
    for found in of_all(ranks, world, f"mask {case}"):
        assert torch.equal(found, expected)


def test_the_op_at_its_edges(ranks):
    for found in of_all(ranks, 2, "edges"):
        assert len(found) == 15 and all(found.values()), found


@pytest.mark.parametrize("case", BARE, ids=str)
def test_the_bare_operator(ranks, case):
    expected = cases.alone(case, "")
    initials = {"x": "x", "A": "lora_a", "B": "lora_b", "b": "bias"}
    for needs in cases.NEEDS:
        wanted = {"y", *(initials[i] for i in needs)}
        for found in of_all(ranks, 2, f"bare {case} {needs}"):
            assert set(found) == wanted
            assert_same(found, {name: expected[name] for name in wanted})


@pytest.mark.parametrize("world", WORLDS)
def test_one_rank_draws_the_seed_for_all(ranks, world):
    case = cases.DRAWN[2 if world == 4 else 1]
    torch.manual_seed(20)
    made = cases.operands(case)
    expected = lk.fused_lora_linear(
        *(made[n] for n in cases.NAMES), scaling=cases.SCALING, dropout_p=cases.P
    )
    for rank, found in enumerate(of_all(ranks, world, "drawn")):
        assert torch.equal(found["y"], expected)
        torch.manual_seed(20 + rank)
        dropout.draw_seed(torch.device("cpu"))
        assert torch.equal(found["next"], torch.rand(1)), "every rank's generator advances"


ERRORS = {
    "plain x": ("TypeError", "for weight, lora_a, lora_b, bias and plain tensors for x, but needs"),
    "plain adapter": ("TypeError", "and plain tensors for lora_a.*ColwiseLoRA or RowwiseLoRA"),
    "plain bias": ("TypeError", "plain tensors for bias.*or pass local tensors"),
    "other mesh": ("ValueError", "lora_b is on .*distribute lora_b over x's mesh"),
    "partial weight": ("NotImplementedError", "weight has placement P.*redistribute weight first"),
    "shape": ("ValueError", r"lora_b must be \[out_features=9, r=3\], but got \[10, 3\]"),
    "bare with dropout": ("NotImplementedError", "does not serve dropout.*fused_lora_linear"),
    "group": ("TypeError", "fused_lora_linear_group: projection 0: got DTensor for x.*each proj"),
    "explain": ("TypeError", "got DTensor for x.*which only fused_lora_linear itself serves"),
    "plain to sharded": ("TypeError", "takes DTensors; call fused_lora_linear"),
    "style of a linear": ("NotImplementedError", "ColwiseLoRA: only lora_kernels.LoRALinear"),
    "style of a merged layer": ("RuntimeError", r"RowwiseLoRA: the layer is merged; call unmerge"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(ranks, name):
    kind, message = ERRORS[name]
    for found in of_all(ranks, 2, "errors"):
        assert re.match(f"{kind}: .*{message}", found[name]), found[name]


ERRORS_2D = {
    "bare": ("NotImplementedError", "several that are used alike.*call lora_kernels.fused"),
    "style": ("ValueError", r"ColwiseLoRA: the mesh must have one dimension.*mesh\['tp'\]"),
    "part of the mesh": ("ValueError", "lora_a is on .*distribute lora_a over x's mesh"),
}


@pytest.mark.parametrize("name", ERRORS_2D)
def test_errors_on_a_mesh_of_two_dimensions(ranks, name):
    kind, message = ERRORS_2D[name]
    for found in of_all(ranks, 4, "errors"):
        assert re.match(f"{kind}: .*{message}", found[name]), found[name]


def test_a_strided_shard_has_no_rule():
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.placement_types import _StridedShard

    from lora_kernels.sharding_rules import rule_of

    strided = _StridedShard(0, split_factor=2)
    for x, weight, name in ((strided, Replicate(), "x"), (Replicate(), strided, "weight")):
        with pytest.raises(NotImplementedError, match=f"{name} has placement.*redistribute {name}"):
            rule_of(x, weight, 3)


# ---- models --------------------------------------------------------------------------------------


def test_ddp(ranks):
    expected = mean_of_shards(Model(), 2)
    for found in of_all(ranks, 2, "ddp"):
        assert_close(found, expected)


def test_ddp_with_windows_of_one_mask(ranks):
    model = Seeded()
    loss_of(model(cases.batch(), torch.tensor(SEED))).backward()
    for found in of_all(ranks, 2, "ddp dropout"):
        assert_close(found, cases.grads_of(model))


@pytest.mark.parametrize("name", cases.FSDP)
def test_fsdp2(ranks, name):
    model, bound, dtypes = Model(**cases.FSDP[name]), CLOSE, {torch.float32}
    if name.endswith("bf16"):
        model, bound = model.to(torch.bfloat16), CLOSE_BF16
    if name == "mixed_norms":
        bound, dtypes = CLOSE_BF16, {torch.float32, torch.bfloat16}
    expected = mean_of_shards(model, 2, seeded=True)
    for found in of_all(ranks, 2, f"fsdp {name}"):
        assert_close(found, expected, bound)
        assert found["dtypes"] == dtypes


@pytest.mark.parametrize("name", cases.TP)
def test_tensor_parallel(ranks, name):
    model, x = Model(**cases.TP[name]), cases.batch().requires_grad_()
    torch.manual_seed(30)
    y = model(x)
    loss_of(y).backward()
    expected = {**cases.grads_of(model), "y": y.detach(), "x": x.grad}
    for found in of_all(ranks, 2, f"tp {name}"):
        assert_close(found, expected)


def test_merging_a_sharded_layer(ranks):
    y = Model()(cases.batch()).detach()
    for found in of_all(ranks, 2, "tp merge"):
        assert_close(found, {"y": y})
        assert found["restored"]


def test_compiling_a_sharded_layer(ranks):
    for found in of_all(ranks, 2, "tp compiled"):
        assert found and all(found.values()), found


def test_autocast_of_a_sharded_model(ranks):
    model = Model()
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model(cases.batch())).backward()
    for found in of_all(ranks, 2, "tp autocast"):
        assert_close(found, cases.grads_of(model), CLOSE_BF16)


def test_an_x_that_a_collective_has_not_finished(ranks):
    model, x = cases.after_linear(), cases.batch().requires_grad_()
    y = model(x)
    loss_of(y).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for found in of_all(ranks, 2, "unfinished input"):
        assert_close(found, {**expected, "y": y.detach(), "x": x.grad})


def test_projections_of_one_dtensor(ranks):
    assert all(found["same"] for found in of_all(ranks, 2, "shared input"))


def test_fsdp2_of_what_is_tensor_parallel(ranks):
    expected = mean_of_shards(Model(), 2)
    for found in of_all(ranks, 4, "two dimensions"):
        assert_close(found, expected)


def test_fsdp2_of_a_peft_model(ranks):
    pytest.importorskip("peft")
    for found in of_all(ranks, 2, "peft"):
        assert found["count"] == 8 and found["off"] <= CLOSE
        assert found["fused"] == 6


def test_saving_the_adapters_of_fsdp2(ranks):
    model = Model(**cases.MIXED)
    expected = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    found = ranks[2, 0]["saved"]  # gathered on rank 0
    assert set(found) == set(expected)
    assert_same(found, expected)


def test_accelerate(ranks):
    pytest.importorskip("accelerate")
    expected = mean_of_shards(Model(), 2)
    for found in of_all(ranks, 2, "accelerate"):
        assert found["kind"] == "DistributedDataParallel"
        assert_close(found, expected)


def test_the_page_quotes_the_model_of_what_is_sent():
    page = Path(__file__).parents[1] / "docs/scaling.md"
    expected = [[*row[:2], communication.in_words(row[2])] for row in communication.table()]
    assert table_of(page, "## What a step sends") == expected
