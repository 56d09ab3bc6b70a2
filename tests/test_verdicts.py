"""Verdict files: stored whole, read only if they are the user's own, of this machine, unedited."""

from __future__ import annotations

import json
import multiprocessing
import os
import stat
import sys
import warnings
from pathlib import Path

import pytest
import verdict_files
from dispatch_facts import GPU, OF_TRITON, WRONG, points, record
from verdict_files import edit, faster

from lora_kernels import machine, records, verdicts
from lora_kernels.verdicts import VerdictWarning

cache, path = verdict_files.cache, verdict_files.path  # fixtures
POSIX = pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owner and mode here")


def refused(found_on: machine.Machine = GPU) -> str:
    """Why the verdict is ignored; it must be said aloud once, and only once."""
    with pytest.warns(VerdictWarning) as told:
        found, why = verdicts.load(found_on)
    assert found is None and len(told) == 1
    text = str(told[0].message)
    assert why in text and "python -m lora_kernels selfcheck" in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verdicts.load(found_on) == (None, why)
    return text


# ---- storing -------------------------------------------------------------------------------------


def test_a_verdict_comes_back(path, cache):
    assert verdicts.load(GPU) == (record(points()), "")
    assert path.parent == cache and path.name == "verdict-nvidia-test-1-9-0.json"


def test_each_backend_has_a_file_of_its_own(path):
    other = verdicts.save(record(points(dtype="float32"), machine=OF_TRITON, backend="triton"))
    assert other != path and other.name == "verdict-nvidia-test-1-9-0-triton.json"
    assert verdicts.path_of(GPU, "cpu") == path, "a device's type names one backend"
    assert verdicts.load(GPU) == (record(points()), "")
    assert verdicts.load(OF_TRITON, "triton")[0].backend == "triton"
    assert verdicts.clear(GPU) == path and verdicts.clear(GPU) is None
    assert verdicts.clear(OF_TRITON, "triton") == other and not other.exists()


def test_no_verdict_is_no_reason_to_speak():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verdicts.load(GPU) == (None, "")


@POSIX
def test_files_are_closed_to_others(path, cache):
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    for file in cache.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert len((cache / "key").read_bytes()) == verdicts.KEY_BYTES


def test_another_dtype_is_added_and_the_same_point_replaced(path):
    again = [p._replace(ours_ms=1.5) for p in points()[:3]]
    verdicts.save(record([*again, *points(dtype="float16")]))
    found, _ = verdicts.load(GPU)
    assert len(found.points) == 2 * len(points())
    assert sum(p.ours_ms == 1.5 for p in found.points) == 3
    assert len(found.checks) == 1


def test_a_wrong_kernel_stays_wrong_until_it_is_checked_again(path):
    verdicts.save(record(checks=[WRONG]))
    verdicts.save(record(points(dtype="float16")))
    assert verdicts.load(GPU)[0].wrong() == ["forward_as decode"]
    verdicts.save(record(checks=[WRONG._replace(status="right", usage=0.1, note="")]))
    assert verdicts.load(GPU)[0].wrong() == []


def test_a_stale_or_broken_verdict_is_replaced(path):
    path.write_text("{")
    verdicts.save(record(points(dtype="float16")))
    assert len(verdicts.load(GPU)[0].points) == len(points())
    newer = GPU._replace(torch="3.0")
    verdicts.save(record(machine=newer))
    assert verdicts.load(newer)[0].points == ()


def test_clear(path):
    assert verdicts.clear(GPU) == path and not path.exists()
    assert verdicts.clear(GPU) is None


def test_a_write_that_fails_leaves_the_old_verdict(path, cache, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    before, names = path.read_bytes(), sorted(cache.iterdir())
    monkeypatch.setattr(verdicts.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        verdicts.save(record(points(dtype="float16")))
    assert path.read_bytes() == before and sorted(cache.iterdir()) == names


def _write(number: int) -> None:
    for turn in range(10):
        one = points()[number]._replace(ours_ms=1.0 + turn)
        verdicts.save(record([one]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
def test_writers_at_the_same_time_lose_nothing(cache):
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found, why = verdicts.load(GPU)
    assert why == "" and len(found.points) == 4
    assert {p.ours_ms for p in found.points} == {10.0}
    assert not list(cache.glob(".*")), "no temporary file is left"


@pytest.mark.parametrize(
    ("platform", "env", "expected"),
    [
        ("linux", {verdicts.ENV: "/a/b"}, "/a/b"),
        ("linux", {"XDG_CACHE_HOME": "/c"}, "/c/lora_kernels"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/lora_kernels"),
        ("linux", {}, "/home/me/.cache/lora_kernels"),
        ("darwin", {}, "/home/me/Library/Caches/lora_kernels"),
        ("win32", {"LOCALAPPDATA": "/d"}, "/d/lora_kernels"),
    ],
)
@POSIX
def test_the_folder(monkeypatch, platform, env, expected):
    for name in (verdicts.ENV, "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert verdicts.folder() == Path(expected)


def test_a_user_without_a_home_has_no_verdict(monkeypatch):
    def homeless():
        raise RuntimeError("no home")

    monkeypatch.delenv(verdicts.ENV)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(verdicts.Path, "home", homeless)
    assert "no home" in refused()


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (faster, "signature is wrong"),
        (lambda c: c["verdict"].update(date="2030-01-01T00:00:00"), "signature is wrong"),
        (lambda c: c.update(hmac="0" * 64), "signature is wrong"),
        (lambda c: c.update(hmac=""), "signature is wrong"),
        (lambda c: c.update(hmac=None), "signature is wrong"),
        (lambda c: c.update(hmac="\ud800"), "signature is wrong"),
        (lambda c: c.update(more=1), "it is no verdict"),
        (lambda c: c.pop("hmac"), "it is no verdict"),
    ],
)
def test_an_edited_verdict(path, change, why):
    edit(path, change)
    assert why in refused()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\x00\xff", b"[" * 100_000, b'{"hmac": NaN, "verdict": 1}', "ü".encode("utf-16")],
    ids=["empty", "cut off", "binary", "deep", "nan", "utf-16"],
)
def test_a_corrupt_verdict(path, content):
    path.write_bytes(content)
    assert "not JSON" in refused()


def test_a_truncated_verdict(path):
    path.write_bytes(path.read_bytes()[:-100])
    assert "not JSON" in refused()


def test_a_huge_verdict(path):
    path.write_bytes(b" " * (verdicts.MAX_BYTES + 1))
    assert "more than" in refused()


def test_a_verdict_of_another_machine(path, cache, tmp_path, monkeypatch):
    """Copied with its folder's key missing: another key has signed it."""
    other = tmp_path / "other"
    monkeypatch.setenv(verdicts.ENV, str(other))
    verdicts.save(record())
    (other / path.name).write_bytes(path.read_bytes())
    assert "signature is wrong" in refused()
    (other / "key").unlink()
    monkeypatch.setattr(verdicts, "_warned", set())
    assert "key that signed it is gone" in refused()


@pytest.mark.parametrize("content", [b"{", None], ids=["cut off", "a folder"])
def test_the_remedy_names_the_backend(content):
    path = verdicts.save(record(machine=OF_TRITON, backend="triton"))
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.warns(VerdictWarning, match="python -m lora_kernels selfcheck --backend triton"):
        assert verdicts.load(OF_TRITON, "triton")[0] is None
    assert verdicts.load(GPU) == (None, ""), "cuda's is not touched"


def test_a_verdict_renamed_to_another_device(path):
    here = GPU._replace(device="NVIDIA Other")
    path.rename(path.with_name("verdict-nvidia-other-9-0.json"))
    assert "stale: it is of device 'NVIDIA Test 1', here 'NVIDIA Other'" in refused(here)


@pytest.mark.parametrize("field", ["torch", "cuda", "driver", "package", "sources"])
def test_a_stale_verdict(path, field):
    here = GPU._replace(**{field: "new"})
    text = refused(here)
    assert "stale" in text and field in text and "'new'" in text


@pytest.mark.parametrize("size", [0, 31])
def test_a_short_key(path, size):
    (path.parent / "key").write_bytes(b"k" * size)
    assert f"the key has {size} bytes" in refused()


def test_a_folder_in_its_place(path):
    path.unlink()
    path.mkdir()
    assert "is no ordinary file" in refused()


@POSIX
def test_links_pipes_and_loops(path, tmp_path, monkeypatch):
    kept = path.rename(tmp_path / "kept")
    for make, why in (
        (lambda: path.symlink_to(kept), "symbolic links"),
        (lambda: path.symlink_to(path), "symbolic links"),
        (lambda: os.mkfifo(path, 0o600), "is no ordinary file"),
    ):
        make()
        monkeypatch.setattr(verdicts, "_warned", set())
        assert why in refused()
        path.unlink()


@POSIX
@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_verdict_that_others_can_write(path, mode):
    path.chmod(mode)
    assert "can be written by other users" in refused()


@POSIX
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_that_others_can_write(path, cache, mode):
    cache.chmod(mode)
    assert "can be written by other users" in refused()
    with pytest.raises(verdicts.Untrusted, match="can be written"):
        verdicts.save(record())


@POSIX
@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_a_key_that_others_can_read(path, mode):
    (path.parent / "key").chmod(mode)
    assert "can be read by other users" in refused()


@POSIX
def test_a_verdict_of_another_user(path, cache, monkeypatch):
    me = os.getuid()
    real = os.fstat

    def fstat(descriptor):
        found = list(real(descriptor))
        found[4] = me + 1
        return os.stat_result(found)

    monkeypatch.setattr(verdicts.os, "fstat", fstat)
    assert "belongs to another user" in refused()
    monkeypatch.undo()
    monkeypatch.setenv(verdicts.ENV, str(cache))
    monkeypatch.setattr(verdicts, "_warned", set())
    monkeypatch.setattr(verdicts.os, "getuid", lambda: me + 1)
    assert f"{cache} belongs to another user" in refused()


def test_a_verdict_that_cannot_be_read(path, monkeypatch):
    real = os.open

    def closed(file, *args, **kwargs):
        if Path(file) == path:
            raise PermissionError(13, "Permission denied")
        return real(file, *args, **kwargs)

    monkeypatch.setattr(verdicts.os, "open", closed)
    assert "Permission denied" in refused()


def resign(path: Path, change) -> None:
    """An edit by somebody who has the key: the schema is checked as well."""
    content = json.loads(path.read_text())
    change(content["verdict"])
    key = (path.parent / "key").read_bytes()
    content["hmac"] = verdicts._signature(key, content["verdict"])
    path.write_text(json.dumps(content))


def in_point(**values):
    return lambda verdict: verdict["points"][0].update(values)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda v: v.update(schema=2), "schema is 2"),
        (lambda v: v.pop("points"), "must be an object with the keys"),
        (lambda v: v.update(extra=1), "must be an object with the keys"),
        (lambda v: v.update(points={}), "points must be a list"),
        (lambda v: v.update(points=[None] * 10_001), "at most 10000"),
        (lambda v: v.update(date="yesterday"), "isoformat"),
        (lambda v: v.update(date="2026-01-01\n"), "must be a line"),
        (lambda v: v["machine"].update(device="x" * 401), "must be a line"),
        (lambda v: v["machine"].update(device=7), "must be a line"),
        (lambda v: v["machine"].pop("driver"), "must be an object"),
        (lambda v: v["checks"][0].update(status="fine"), "status must be one of"),
        (lambda v: v["checks"][0].update(shape=[1, 2, 3]), "shape has 3 sizes"),
        (lambda v: v["checks"][0].update(usage=-1), "usage must be a finite number"),
        (in_point(ours_ms=0), "ours_ms must be a finite number"),
        (in_point(ours_ms=1e400), "not JSON"),
        (in_point(ours_ms=True), "ours_ms must be a finite number"),
        (in_point(ours_ms=10**400), "ours_ms must be a finite number"),
        (in_point(composed_ms="1"), "composed_ms must be a finite number"),
        (in_point(m=0), "m must hold integers"),
        (in_point(m=1.5), "m must hold integers"),
        (in_point(m=2**40), "m must hold integers"),
        (in_point(right=1), "right must be true or false"),
        (in_point(dtype="float64"), "dtype must be one of"),
        (in_point(**{"pass": "both"}), "pass must be one of"),
    ],
)
def test_a_malformed_verdict(path, change, why):
    resign(path, change)
    assert why in refused()


def test_parse_undoes_dump_and_raises_value_errors_alone():
    found = record(points(), checks=[WRONG])
    assert records.parse(json.loads(json.dumps(records.dump(found)))) == found
    for junk in (None, 1, "a", [], {}, {"schema": 1}, {1: 2}, [[]], float("nan")):
        with pytest.raises(ValueError):
            records.parse(junk)
