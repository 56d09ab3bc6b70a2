"""What a verdict does to the automatic choice of a process, and of several ranks."""

from __future__ import annotations

import multiprocessing
import os
import warnings

import pytest
import torch
import torch.distributed as dist
import verdict_files
from dispatch_facts import GPU, INSIDE, WRONG, points, record
from verdict_files import edit, faster

from lora_kernels import dispatch, distributed, machine, records, verdicts
from lora_kernels.verdicts import VerdictWarning

cache, path = verdict_files.cache, verdict_files.path  # fixtures
CPU = torch.device("cpu")


@pytest.fixture
def here(monkeypatch) -> torch.device:
    """A device of which this process believes that it is GPU's."""
    monkeypatch.setattr(machine, "of", lambda device: GPU)
    dispatch.reload()
    yield torch.device("cuda", 0)
    monkeypatch.undo()
    dispatch.reload()


def test_the_choice_follows_a_good_verdict(path, here):
    found = dispatch.evidence(here).find(torch.bfloat16, INSIDE)
    assert found.won and str(path) in found.why


def test_the_choice_ignores_an_edited_one_and_says_why(path, here):
    edit(path, faster)
    with pytest.warns(VerdictWarning):
        found = dispatch.evidence(here).find(torch.bfloat16, INSIDE)
    assert not found.won and "signature is wrong" in found.why and str(path) in found.why


def test_a_failing_verdict_is_loud(here):
    verdicts.save(record(points(), checks=[WRONG]))
    with pytest.warns(VerdictWarning, match="backend 'cuda' is out: a kernel is wrong"):
        found = dispatch.evidence(here)
    assert not found.steers(torch.bfloat16)
    assert "forward_as decode" in found.find(torch.bfloat16, INSIDE).why


def test_a_verdict_of_another_backend_steers_nothing(here):
    verdicts.save(record(points())._replace(backend="cpu"))
    found = dispatch.evidence(here).find(torch.bfloat16, INSIDE)
    assert not found.won and "of backend 'cpu'" in found.why


def test_a_new_verdict_is_read_after_reload(here):
    assert not dispatch.evidence(here).steers(torch.bfloat16)
    verdicts.save(record(points()))
    dispatch.reload()
    assert dispatch.evidence(here).steers(torch.bfloat16)


# ---- several ranks -------------------------------------------------------------------------------

CASES = ("good", "other sources", "wrong here", "nothing", "malformed")


def _rank(rank: int, store: str, cache: str, results) -> None:
    """Each case in turn; rank 0 has the verdict, rank 1 what the case says."""
    os.environ[verdicts.ENV] = f"{cache}/{rank}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}
    for case in CASES:
        here = GPU
        if case == "other sources" and rank == 1:
            here = GPU._replace(sources="6" * 64)
        machine.of = lambda device, here=here: here
        verdicts.clear(GPU)
        dispatch.use_shared(None)
        if rank == 0 and case != "nothing":
            verdicts.save(record(points()))
        if rank == 1 and case == "wrong here":
            verdicts.save(record(checks=[WRONG]))
        before = dispatch.evidence(CPU).find(torch.bfloat16, INSIDE)
        dump = records.dump
        if case == "malformed":
            records.dump = lambda record: {"schema": 1}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            shared = distributed.share_verdicts(device=CPU)
        records.dump = dump
        after = dispatch.evidence(CPU).find(torch.bfloat16, INSIDE)
        text = " ".join(str(w.message) for w in told)
        found[case] = (shared, before.won, after.won, after.why, text)
    results.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch has no gloo")
def test_all_ranks_use_the_verdict_of_rank_0_or_none_does(tmp_path):
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=_rank, args=(rank, str(tmp_path / "s"), str(tmp_path), results))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(30)
        assert process.exitcode == 0
    for rank in range(2):
        shared, before, after, why, told = found[rank]["good"]
        assert shared and after and "rank 0's verdict" in why and told == ""
        assert not before, "a rank's own verdict does not count among several"
        for case, words in (
            ("other sources", "rank 1: what came is of sources"),
            ("wrong here", "rank 1: a kernel is wrong here: forward_as decode"),
            ("nothing", "rank 0 has nothing to share: it has no verdict"),
            ("malformed", "what came is malformed"),
        ):
            shared, _, after, why, told = found[rank][case]
            assert not shared and not after, (rank, case)
            assert words in told and "no rank uses" in told, (rank, case, told)


def test_sharing_needs_torch_distributed():
    with pytest.raises(RuntimeError, match="init_process_group"):
        distributed.share_verdicts()
