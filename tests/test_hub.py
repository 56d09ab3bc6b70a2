"""The kernels hub's layout: build.toml, and a namespace that is spelled once on each side."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from includes import closure

import lora_kernels as lk

ROOT = Path(__file__).parents[1]
LAYOUT = runpy.run_path(str(ROOT / "hub/layout.py"))
# What kernel-builder puts there, but for its library.
OPS = """\
import torch
ops = torch.ops._lora_kernels_cpu_1234567

def add_op_namespace_prefix(op_name: str):
    return f"_lora_kernels_cpu_1234567::{op_name}"
"""


@pytest.fixture
def folder(tmp_path):
    LAYOUT["lay_out"](tmp_path / "hub")
    return (tmp_path / "hub").resolve()


def test_build_toml_is_up_to_date():
    assert (ROOT / "build.toml").read_text() == LAYOUT["build_toml"](), (
        "python hub/layout.py --write writes it"
    )


def test_build_toml_names_what_setup_compiles():
    tomllib = pytest.importorskip("tomllib")
    found = tomllib.loads((ROOT / "build.toml").read_text())
    cuda = found["kernel"]["lora_kernels_cuda"]
    named = set(found["torch"]["src"]) | set(cuda["src"])
    assert all((ROOT / path).is_file() for path in named)
    compiled = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.c[pu]*")}
    assert compiled <= named
    setup = (ROOT / "setup.py").read_text()
    archs = ";".join(cuda["cuda-capabilities"])
    assert f'DEFAULT_ARCHS = "{archs}"' in setup
    major, minor = found["torch"]["stable-abi"]["cuda"].split(".")
    assert f"0x{int(major):02x}{int(minor):02x}000000000000" in setup


def test_the_folder_has_all_that_its_sources_include(folder):
    def files(root, source):
        return [path.relative_to(root) for path in closure(root / source, [])]

    sources = [path.relative_to(folder) for path in folder.rglob("*.c[pu]*")]
    for source in sources:
        assert files(folder, source) == files(ROOT, source)
    assert len(sources) > 20
    assert (folder / "flake.nix").is_file() and (folder / "build.toml").is_file()


def test_the_namespace_is_spelled_once():
    package = ROOT / "lora_kernels"
    name = re.compile(r"torch\.ops\.(?!mkldnn)|[\"']lora_kernels::|Library\(\"")
    spelled = [p.name for p in package.rglob("*.py") if name.search(p.read_text())]
    assert spelled == ["_ops.py"]
    registering = [
        path.name
        for path in (ROOT / "csrc").rglob("*.*")
        if "TORCH_LIBRARY" in path.read_text() or "PyInit__C" in path.read_text()
    ]
    assert registering == ["library.h"]
    assert (ROOT / "csrc/torch/library.h").read_text().count("lora_kernels\n") == 1


def test_imports_are_relative():
    for path in (ROOT / "lora_kernels").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) lora_kernels", path.read_text(), re.MULTILINE)


def test_a_second_build_in_one_process(folder, monkeypatch):
    """The package under another name and namespace computes the same, compiled too."""
    package = folder / "torch-ext/lora_kernels"
    assert not (package / "_ops.py").exists() and not list(package.glob("_C*"))
    (package / "_ops.py").write_text(OPS)
    spec = importlib.util.spec_from_file_location(
        "hub_build", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    other = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "hub_build", other)
    try:
        spec.loader.exec_module(other)
    finally:
        for name in [name for name in sys.modules if name.startswith("hub_build.")]:
            monkeypatch.setitem(sys.modules, name, sys.modules.pop(name))
    torch.manual_seed(0)
    x, weight = torch.randn(9, 12, requires_grad=True), torch.randn(8, 12)
    a, b = torch.randn(3, 12, requires_grad=True), torch.randn(8, 3, requires_grad=True)
    settings = dict(dropout_p=0.25, seed=torch.tensor([1, 2]), backend="composed")

    def run(build):
        y = build.fused_lora_linear(x, weight, a, b, **settings)
        return (y, *torch.autograd.grad(y.square().sum(), (x, a, b)))

    for one, two in zip(run(lk), run(other), strict=True):
        assert torch.equal(one, two)
    ops = torch.ops._lora_kernels_cpu_1234567
    call = (x, weight, a, b, None, settings["seed"], 1.0, 0.25, "composed")  # as torch.compile does
    y = ops.lora_linear(*call)[0]
    assert torch.equal(y, run(other)[0])
    torch.autograd.grad(y.square().sum(), (x, a, b))
    call = [each.to("meta") if isinstance(each, torch.Tensor) else each for each in call]
    assert ops.lora_linear(*call)[0].shape == (9, 8)
    assert not other.schemas.has_kernel("forward", "CPU"), "no library, no C++ kernel"
