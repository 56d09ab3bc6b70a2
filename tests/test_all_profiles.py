"""Everything in one command: in which order, on which tree, and what a refusal stops."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from bench import all_profiles, profiles, provenance  # noqa: E402


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A repository with one commit, which is the project's root."""
    root = tmp_path / "tree"
    root.mkdir()
    (root / ".gitignore").write_text("/bench/out/\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    monkeypatch.setattr(provenance, "ROOT", root)
    monkeypatch.delenv("LORA_KERNELS_COMMIT", raising=False)
    return root


def test_a_folder_that_git_sees_is_refused_and_one_that_it_ignores_is_not(tree, tmp_path):
    assert "git sees" in all_profiles.refusal(tree / "out") and not (tree / "out").exists()
    for place in (tree / "bench/out/gpu", tmp_path / "elsewhere"):
        assert all_profiles.refusal(place) is None
        assert list(place.iterdir()) == []
        assert "is there already" in all_profiles.refusal(place)


def test_a_changed_tree_is_refused_before_anything_runs(tree, tmp_path, monkeypatch):
    (tree / "new.py").touch()
    assert "not that of a commit" in all_profiles.refusal(tmp_path / "out")
    monkeypatch.setenv("LORA_KERNELS_COMMIT", "abc")  # of a copy, which says so itself
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert all_profiles.refusal(tmp_path / "out") is None


def test_all_are_run_before_any_is_published(tree, tmp_path, monkeypatch, capsys):
    """The CUDA kernels first, which the others' numbers rest on; a refusal stops nothing."""
    ran = []

    def run(module: str, *arguments: str) -> bool:
        ran.append((module, *arguments))
        return "sweep" not in arguments[0] if module == "publish" else module != "gpu_suite"

    monkeypatch.setattr(all_profiles, "run", run)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["all_profiles", str(out), "--use-carried"])
    assert all_profiles.main() == 1
    names = list(profiles.PROFILES)
    assert names[0] == "cuda"
    assert ran == [
        *(("gpu_suite", str(out / p), f"--{p}", "--use-carried") for p in names),
        *(("publish", str(out / p), "--replace") for p in names), ("dispatch",), ("performance",),
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert said.count("refused: ") == 1 and f"bench.publish {out}/sweep" in said
    monkeypatch.setattr(sys, "argv", ["all_profiles", str(out)])
    with pytest.raises(SystemExit):
        all_profiles.main()
    assert "is there already" in capsys.readouterr().err


def test_a_command_runs_in_the_project(capfd):
    assert not all_profiles.run("publish", "no-such-folder")
    assert "has no suite.json" in capfd.readouterr().err


def test_make_takes_an_interpreter_that_is_there():
    command = ["make", "-n", "evidence", "VENV=no-such-folder", "OUT=x"]
    of_make = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # of the make that runs the tests
    environment = {name: value for name, value in os.environ.items() if name not in of_make}
    said = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert said.split() == ["python3", "-m", "bench.all_profiles", "x"]
