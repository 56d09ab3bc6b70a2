"""The build modes of setup.py, each installed by pip as a user would, into a folder of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from lora_kernels.schemas import EXTENSION_ERROR, has_kernel

ROOT = Path(__file__).parents[1]
SHIPPED = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "csrc",
    "lora_kernels",
)
NVCC = any(
    Path(p, "bin/nvcc").exists() for p in ("/usr/local/cuda", os.environ.get("CUDA_HOME", ""))
)
CALL = (
    # an editable install of this very package would lend its library to the copy under test
    "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()];"
    "import torch, lora_kernels as lk; from lora_kernels.schemas import has_kernel as has;"
    "x = torch.ones(4, 4); y = lk.fused_lora_linear(x, x, x, x, dropout_p=0.5);"
    "print(lk.__file__, has('forward', 'CPU'), has('dropout_mask', 'CUDA'),"
    "      lk.explain(x, x, x, x).backend)"
)


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of what a source distribution holds, without anything that was built."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def pip(*args: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *args]
    environment = {**os.environ, "MAX_JOBS": "2", **env}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def install(source: Path, target: Path, mode: str, **env: str) -> subprocess.CompletedProcess:
    return pip(
        "install", "--no-deps", "--no-build-isolation", "--target", str(target), str(source),
        LORA_KERNELS_BUILD=mode, **env,
    )  # fmt: skip


def use(target: Path) -> list[str]:
    """[file, C++ on CPU, CUDA mask, automatic backend] of the package in `target`."""
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", CALL], env=environment, capture_output=True, text=True, cwd=target
    )
    assert done.returncode == 0, done.stderr
    file, *rest = done.stdout.split()
    assert file.startswith(str(target)), "the installed copy must be the one that ran"
    return rest


@pytest.mark.parametrize("mode", ["python", "no compiler"])
def test_pure_python(source, tmp_path, mode):
    env = {} if mode == "python" else {"CXX": "/no/such/compiler", "CC": "/no/such/compiler"}
    done = install(source, tmp_path / "site", "python" if mode == "python" else "auto", **env)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "site/lora_kernels").glob("_C*"))
    assert use(tmp_path / "site") == ["False", "False", "composed"]


def test_no_nvcc_builds_the_cpu_kernels(source, tmp_path):
    done = install(source, tmp_path / "site", "auto", CUDA_HOME="/no/such/toolkit")
    assert done.returncode == 0, done.stderr
    assert use(tmp_path / "site") == ["True", "False", "cpu"]


@pytest.mark.parametrize(
    "mode, env, message",
    [
        (
            "cuda",
            {"CUDA_HOME": "/no/such/toolkit"},
            r"LORA_KERNELS_BUILD=cuda: no CUDA toolkit \(set CUDA_HOME\)",
        ),
        ("cpu", {"CXX": "/no/such/compiler"}, "LORA_KERNELS_BUILD=cpu: no C.. compiler"),
        ("gpu", {}, "LORA_KERNELS_BUILD=gpu: expected auto, cuda, cpu or python"),
    ],
)
def test_a_mode_that_cannot_be_built_fails(source, tmp_path, mode, env, message):
    done = install(source, tmp_path / "site", mode, **env)
    assert done.returncode != 0
    assert re.search(message, done.stdout + done.stderr)


@pytest.mark.slow
def test_isolated_build_finds_the_installed_torch(source, tmp_path):
    done = pip("install", "--no-deps", "--target", str(tmp_path / "site"), str(source))
    assert done.returncode == 0, done.stderr
    assert use(tmp_path / "site")[0] == "True"


def test_sdist_to_wheel(source, tmp_path):
    """The sdist holds all sources; the wheel built from it is abi3 and has the library inside."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)],
        cwd=source, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    mode = "cuda" if NVCC else "cpu"
    done = pip(
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(sdist),
        LORA_KERNELS_BUILD=mode,
        TORCH_CUDA_ARCH_LIST="8.0",  # the host's pass reads the headers of sm_90a all the same
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "lora_kernels/_C.abi3.so" in names and "lora_kernels/py.typed" in names
    assert "lora_kernels/dispatch.json" in names
    assert not any(n.startswith(("tests", "bench", "csrc")) for n in names)


@pytest.mark.skipif(EXTENSION_ERROR is not None, reason="no C++ library")
def test_library_links_neither_the_driver_nor_the_runtime():
    """libcuda or libcudart as a dependency would make import fail on a machine without them."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf")
    (library,) = (ROOT / "lora_kernels").glob("_C*.so")
    out = subprocess.run([readelf, "-d", str(library)], capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+?)\]", out)
    assert "libtorch.so" in needed and not any("cuda" in n for n in needed)


@pytest.mark.skipif(not has_kernel("dropout_mask", "CUDA"), reason="built without nvcc")
def test_embedded_architectures():
    """sm_80 with PTX for what is newer, and sm_90a: of every source."""
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("no Triton, which brings cuobjdump")
    cuobjdump = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    (library,) = (ROOT / "lora_kernels").glob("_C*.so")
    listed = subprocess.run(
        [cuobjdump, "-lelf", "-lptx", library], capture_output=True, text=True, check=True
    ).stdout
    found = Counter(re.findall(r"\.(sm_\w+\.\w+)$", listed, re.MULTILINE))
    sources = len(list((ROOT / "csrc/cuda").glob("*.cu")))
    assert found == {"sm_80.cubin": sources, "sm_80.ptx": sources, "sm_90a.cubin": sources}


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("8.0;9.0", "8.0;9.0a"), ("9.0+PTX", "9.0a+PTX"), ("9.0a 8.6", "9.0a 8.6"),
        ("8.9,9.0", "8.9,9.0a"), ("", "8.0+PTX;9.0a"),
    ],
)  # fmt: skip
def test_hopper_is_built_with_its_own_instructions(given, taken, monkeypatch):
    """Also where an image asks for 9.0, of which the kernels for sm_80 would be all there is."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    source = (ROOT / "setup.py").read_text()
    found: dict = {}
    exec(source[: source.index("def cuda_home")], found)
    assert found["ARCHS"] == taken
