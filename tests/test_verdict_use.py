"""What a verdict does to the automatic choice of a process, and of several ranks."""

from __future__ import annotations

import multiprocessing
import os
import warnings

import pytest
import torch
import torch.distributed as dist
import verdict_files
from dispatch_facts import GPU, INSIDE, OF_TRITON, WRONG, on_gpu, points, record
from verdict_files import edit, faster

from lora_kernels import dispatch, distributed, machine, records, verdicts
from lora_kernels.triton_kernels import digest
from lora_kernels.verdicts import VerdictWarning

cache, path = verdict_files.cache, verdict_files.path  # fixtures
CPU = torch.device("cpu")


@pytest.fixture
def here(monkeypatch) -> torch.device:
    """A device of which this process believes that it is GPU's."""
    monkeypatch.setattr(machine, "of", on_gpu)
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


def test_a_verdict_speaks_for_its_own_backend_alone(here):
    path = verdicts.save(record(points(), machine=OF_TRITON, backend="triton"))
    found = dispatch.evidence(here, "triton").find(torch.bfloat16, INSIDE)
    assert found.won and str(path) in found.why and path.name.endswith("9-0-triton.json")
    assert not dispatch.evidence(here).steers(torch.bfloat16)
    assert "you have no verdict" in dispatch.evidence(here).find(torch.bfloat16, INSIDE).why


@pytest.mark.parametrize(("bad", "good"), [("cuda", "triton"), ("triton", "cuda")])
def test_a_failing_verdict_forbids_its_own_backend_alone(here, bad, good):
    verdicts.save(record(points(), machine=on_gpu(here, good), backend=good))
    verdicts.save(record(points(), [WRONG], on_gpu(here, bad), bad))
    with pytest.warns(VerdictWarning, match=f"backend '{bad}' is out: a kernel is wrong") as told:
        forbidden = dispatch.evidence(here, bad)
        known = dispatch.evidence(here, good)
    assert len(told) == 1 and verdicts.remedy(bad) in str(told[0].message)
    assert not forbidden.find(torch.bfloat16, INSIDE).won
    assert known.steers(torch.bfloat16) and known.find(torch.bfloat16, INSIDE).won


def test_both_backends_that_fail_are_told(here):
    for backend in dispatch.MEASURED:
        verdicts.save(record(points(), [WRONG], on_gpu(here, backend), backend))
    with pytest.warns(VerdictWarning) as told:
        for backend in dispatch.MEASURED:
            assert not dispatch.evidence(here, backend).steers(torch.bfloat16)
    assert len(told) == len(dispatch.MEASURED)


def test_a_file_renamed_to_another_backend_steers_nothing(path, here, monkeypatch):
    """Signed and of this machine, if the backends had one hash."""
    path.rename(verdicts.path_of(GPU, "triton"))
    monkeypatch.setattr(machine, "of", lambda device, backend: GPU)
    found = dispatch.evidence(here, "triton").find(torch.bfloat16, INSIDE)
    assert not found.won and "of backend 'cuda'" in found.why


def test_other_kernels_or_another_triton_make_a_verdict_stale(here, monkeypatch, tmp_path):
    kernel = tmp_path / "kernel.py"
    kernel.write_text("before")
    hashes = [digest.of_version("3.7.1", tmp_path), digest.of_version("3.8.0", tmp_path)]
    kernel.write_text("after")
    hashes.append(digest.of_version("3.7.1", tmp_path))
    assert len(set(hashes)) == 3
    verdicts.save(record(points(), machine=GPU._replace(sources=hashes[0]), backend="triton"))
    verdicts.save(record(points()))
    for sources in hashes:
        of_triton = GPU._replace(sources=sources)
        monkeypatch.setattr(
            machine, "of", lambda device, backend, of=of_triton: of if backend == "triton" else GPU
        )
        monkeypatch.setattr(verdicts, "_warned", set())
        dispatch.reload()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = dispatch.evidence(here, "triton").find(torch.bfloat16, INSIDE)
        assert found.won == (sources == hashes[0])
        if not found.won:
            assert "it is stale: it is of sources" in found.why
            assert "selfcheck --backend triton" in found.why and len(told) == 1
        assert dispatch.evidence(here).steers(torch.bfloat16), "cuda's is not stale"


def test_a_verdict_of_a_cpu_is_not_read(monkeypatch):
    """Triton's interpreter serves CPU tensors; what was timed in it must not be chosen by."""
    cpu = OF_TRITON._replace(driver="")
    verdicts.save(record(points(), machine=cpu, backend="triton"))
    monkeypatch.setattr(machine, "of", lambda device, backend: cpu)
    dispatch.reload()
    found = dispatch.evidence(CPU, "triton")
    assert not found.steers(torch.bfloat16)
    assert "a verdict of a CPU steers nothing" in found.find(torch.bfloat16, INSIDE).why


def test_a_new_verdict_is_read_after_reload(here):
    assert not dispatch.evidence(here).steers(torch.bfloat16)
    verdicts.save(record(points()))
    dispatch.reload()
    assert dispatch.evidence(here).steers(torch.bfloat16)


# ---- several ranks -------------------------------------------------------------------------------

CASES = ("good", "other sources", "wrong here", "nothing", "malformed")
# of both backends: what befalls triton's verdict leaves that of cuda alone
BOTH = ("both", "other triton", "triton wrong here", "triton renamed")


def _rank(rank: int, store: str, cache: str, results) -> None:
    """Each case in turn; rank 0 has the verdict, rank 1 what the case says."""
    os.environ[verdicts.ENV] = f"{cache}/{rank}"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = {}
    for case in CASES + BOTH:
        here = {"cuda": GPU, "triton": OF_TRITON}
        other = {"other sources": "cuda", "other triton": "triton"}.get(case)
        if other and rank == 1:
            here[other] = GPU._replace(sources="6" * 64)
        machine.of = lambda device, backend="cuda", here=here: here[backend]
        for backend in here:
            verdicts.clear(GPU, backend)
        dispatch.use_shared()
        if rank == 0 and case != "nothing":
            verdicts.save(record(points()))
        if rank == 0 and case in BOTH:
            path = verdicts.save(record(points(), machine=OF_TRITON, backend="triton"))
        if rank == 0 and case == "triton renamed":
            here["triton"] = GPU
            path.write_bytes(verdicts.path_of(GPU).read_bytes())
        if rank == 1 and case == "wrong here":
            verdicts.save(record(checks=[WRONG]))
        if rank == 1 and case == "triton wrong here":
            verdicts.save(record(checks=[WRONG], machine=OF_TRITON, backend="triton"))
        before = dispatch.evidence(CPU).find(torch.bfloat16, INSIDE)
        dump = records.dump
        if case == "malformed":
            records.dump = lambda record: {"schema": 1}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            shared = distributed.share_verdicts(device=CPU)
            after = dispatch.evidence(CPU).find(torch.bfloat16, INSIDE)
            triton = dispatch.evidence(CPU, "triton").find(torch.bfloat16, INSIDE)
        records.dump = dump
        text = " ".join(str(w.message) for w in told)
        found[case] = (shared, before.won, after.won, after.why, text, triton)
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
        shared, before, after, why, told, triton = found[rank]["good"]
        assert shared and after and "rank 0's verdict" in why and told == ""
        assert not before, "a rank's own verdict does not count among several"
        assert not triton.won and "you have no verdict" in triton.why
        for case, words in (
            ("other sources", "rank 1: what came is of sources"),
            ("wrong here", "rank 1: a kernel is wrong here: forward_as decode"),
            ("nothing", "rank 0 has nothing to share: it has no verdict"),
            ("malformed", "what came is malformed"),
        ):
            shared, _, after, why, told, triton = found[rank][case]
            assert not shared and not after and not triton.won, (rank, case)
            assert words in told and "no rank uses" in told, (rank, case, told)
        shared, _, after, why, told, triton = found[rank]["both"]
        assert shared and after and triton.won and "rank 0's verdict" in triton.why and not told
        for case, words in (
            ("other triton", "rank 1: what came is of sources"),
            ("triton wrong here", "rank 1: a kernel is wrong here: forward_as decode"),
            ("triton renamed", "what came is of backend 'cuda'"),
        ):
            shared, _, after, why, told, triton = found[rank][case]
            assert not shared and after and not triton.won, (rank, case)
            assert words in told and "verdict of backend 'triton'" in told, (rank, case, told)
            assert "selfcheck --backend triton on rank 0" in told, (rank, case, told)


def test_sharing_needs_torch_distributed():
    with pytest.raises(RuntimeError, match="init_process_group"):
        distributed.share_verdicts()
