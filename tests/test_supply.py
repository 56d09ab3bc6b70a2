"""What the package is made of and reaches: symbols, build paths, versions, the network."""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from test_build import NVCC, ROOT, source  # noqa: F401  (a fixture)

from lora_kernels.schemas import EXTENSION_ERROR

built = pytest.mark.skipif(EXTENSION_ERROR is not None, reason="no C++ library")
binutils = pytest.mark.skipif(
    not (shutil.which("nm") and shutil.which("readelf")), reason="no binutils"
)


def library() -> Path:
    (found,) = (ROOT / "lora_kernels").glob("_C*.so")
    return found


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def symbols(kind: str) -> set[str]:
    """--defined-only or --undefined-only; a version such as @GLIBC_2.34 is no part of a name."""
    lines = output("nm", "-D", kind, library()).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


# ---- the library ---------------------------------------------------------------------------------


@built
@binutils
def test_the_library_exports_what_python_looks_up_and_nothing_else():
    assert symbols("--defined-only") == {"PyInit__C"}


@built
@binutils
def test_of_python_and_torch_it_needs_the_stable_abis_alone():
    needed = symbols("--undefined-only")
    assert {n for n in needed if n.startswith(("Py", "_Py"))} == {"PyModule_Create2"}
    of_libstdcxx = re.compile(r"_Z(N?K?S|T[ISV](S|N10__cxxabiv1)|Std?l?|n[wa]|d[la])")
    foreign = {n for n in needed if n.startswith("_Z") and not of_libstdcxx.match(n)}
    assert not foreign, "C++ of another library, whose ABI no version of torch promises"
    shims = {n for n in needed if "torch" in n.lower()}
    assert shims and all(re.match(r"(aoti_)?torch_", n) for n in shims)


@built
@binutils
def test_it_needs_no_newer_libstdcxx_than_torch():
    """Where torch loads, it loads. glibc is the build machine's: its wheel is tagged for that."""

    def newest(path: Path) -> tuple[int, ...]:
        found = re.findall(r"GLIBCXX_([\d.]+)", output("readelf", "-V", path))
        return max(tuple(map(int, version.split("."))) for version in found)

    theirs = Path(torch.__file__).parent / "lib/libtorch_cpu.so"
    assert newest(library()) <= newest(theirs)


@built
def test_no_folder_of_the_build_machine_is_in_it():
    found = library().read_bytes()
    for folder in (str(ROOT), sys.prefix, "site-packages"):
        assert folder.encode() not in found


# ---- builds --------------------------------------------------------------------------------------


def without_network() -> list[str]:
    """A command that runs another where no network is."""
    command = ["unshare", "-rn"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"]).returncode:
        pytest.skip("no unprivileged network namespaces here")
    return command


def wheel_from(folder: Path, *before: str, **env: str) -> str:
    """The hash of the wheel that setup.py makes there."""
    command = [*before, sys.executable, "setup.py", "-q", "bdist_wheel", "-d", "out"]
    environment = {**os.environ, "MAX_JOBS": "2", "PYTHONPATH": "", **env}
    environment.pop("SOURCE_DATE_EPOCH", None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (folder / "out").glob("*.whl")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["python", "cpu"])
def test_two_folders_build_the_same_wheel(source, tmp_path, mode):  # noqa: F811
    """The second of another name, with files of other times, and without a network."""
    other = tmp_path / "elsewhere" / "deeper"
    shutil.copytree(source, other, copy_function=shutil.copyfile)
    first = wheel_from(source, LORA_KERNELS_BUILD=mode)
    assert first == wheel_from(other, *without_network(), LORA_KERNELS_BUILD=mode)


@pytest.mark.slow
@pytest.mark.skipif(not NVCC, reason="no CUDA toolkit")
def test_two_folders_compile_the_same_cuda_object(source, tmp_path):  # noqa: F811
    other = tmp_path / "elsewhere" / "deeper"
    shutil.copytree(source, other)
    setup = (ROOT / "setup.py").read_text()
    assert '"-objtemp", *NVCC_FLAGS' in setup and "-ffile-prefix-map={folder}/=" in setup
    flags = runpy.run_path(str(ROOT / "tests/gates.py"))["setup_constant"]("NVCC_FLAGS")
    hashes = []
    for folder in (source, other):
        maps = f"-Xcompiler=-fPIC,-ffile-prefix-map={folder}/="
        command = ["nvcc", "-objtemp", *flags, maps, "-gencode=arch=compute_80,code=sm_80", "-c"]
        subprocess.run(
            [*command, folder / "csrc/cuda/reduce.cu", "-o", folder / "reduce.o"],
            check=True, capture_output=True,
        )  # fmt: skip
        hashes.append(hashlib.sha256((folder / "reduce.o").read_bytes()).hexdigest())
    assert hashes[0] == hashes[1]


# ---- versions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["requirements-dev.txt", "requirements-peft.txt", "examples/requirements.txt",
     "constraints.txt"],
)  # fmt: skip
def test_every_requirement_names_one_version(path):
    lines = [line.partition("#")[0].strip() for line in (ROOT / path).read_text().splitlines()]
    loose = [line for line in lines if line and not re.fullmatch(r"[\w.-]+==[\w.!]+", line)]
    assert not loose


def locked(path: str) -> dict[str, str]:
    pairs = re.findall(r"^([\w.-]+)==([\w.!]+)", (ROOT / path).read_text(), re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_the_lock_holds_what_is_required():
    """constraints.txt is what pip takes for everything that the requirements pull in."""
    lock = locked("constraints.txt")
    required = locked("requirements-dev.txt") | locked("examples/requirements.txt")
    assert required.items() <= lock.items()
    assert "torch" not in lock, "the Makefile pins it, in the build for this machine"
    assert "-c constraints.txt" in (ROOT / "Makefile").read_text()


def test_the_bill_of_materials_is_up_to_date():
    made = runpy.run_path(str(ROOT / "hub/sbom.py"))["sbom"]()
    assert (ROOT / "sbom.json").read_text() == made, "python hub/sbom.py --write writes it"
    found = json.loads(made)
    required = {c["name"] for c in found["components"] if c["scope"] == "required"}
    assert required == {r.partition(">")[0] for r in requires("lora-kernels") or () if ";" not in r}
    assert len({c["bom-ref"] for c in found["components"]}) == len(found["components"])


# ---- the network ---------------------------------------------------------------------------------

DENY = """
import os, runpy, sys
def deny(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print("network:", event, file=sys.stderr, flush=True)
        os._exit(77)
sys.addaudithook(deny)
def main(*argv, run=runpy.run_module, of="lora_kernels"):
    sys.argv[:] = [of, *argv]
    try:
        run(of, run_name="__main__")
    except SystemExit as end:
        assert not end.code
"""
STEPS = {
    "import, a call, the report and selfcheck": """
import torch, lora_kernels as lk
x = torch.ones(4, 4, requires_grad=True)
lk.fused_lora_linear(x, *[torch.ones(4, 4)] * 3, dropout_p=0.5).sum().backward()
main()
main("selfcheck", "--device", "cpu", "--shapes", "16x24x32x4", "--no-operators", "--no-store")
""",
    "build": "main('-q', 'build_py', '-d', sys.argv[1], run=runpy.run_path, of='setup.py')",
}


def isolated(code: str, *args: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LORA_KERNELS_BUILD": "python"}
    return subprocess.run(
        [sys.executable, "-c", DENY + code, *args],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("step", STEPS)
def test_nothing_asks_for_the_network(step, tmp_path):
    done = isolated(STEPS[step], str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_what_does_ask_is_found_out():
    done = isolated("import urllib.request as r; r.urlopen('http://127.0.0.1:9')")
    assert done.returncode == 77 and "network: socket" in done.stderr
