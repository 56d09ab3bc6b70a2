"""The folder that kernel-builder builds for the Hugging Face kernels hub.

    python hub/layout.py --write      build.toml, whose lists of files follow csrc/
    python hub/layout.py dist/hub     the folder, ready for `kernel-builder build`

kernel-builder takes only files that build.toml names, and Python only from torch-ext/NAME, where it
puts an _ops.py of its own: so the package is copied there, without ours.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME = "lora_kernels"
PACKAGE = ROOT / NAME
OWN = ("_ops.py", "_C*.so", "__pycache__")  # kernel-builder makes what stands in their place
TEMPLATE = """\
# For kernel-builder, see docs/hub.md; `python hub/layout.py --write` writes it.

[general]
name = "lora-kernels"
version = 0 # alpha, by the hub's convention
edition = 5
license = "BSD-3-Clause"
backends = ["cpu", "cuda"]

[torch]
pyext = ["py", "json"]
cxx-flags = ["-DLK_HUB"]
src = [
{torch}
]

[torch.stable-abi]
cpu = "2.11"
cuda = "2.11"

[kernel.lora_kernels_cuda]
backend = "cuda"
depends = ["torch"]
cuda-capabilities = ["8.0+PTX", "9.0a"]
cxx-flags = ["-DLK_HUB", "-DLK_SM90A"]
src = [
{cuda}
]
"""


def sources() -> dict[str, list[str]]:
    """Every file of csrc that is compiled or included, by the section of build.toml it goes to."""
    found: dict[str, list[str]] = {"torch": [], "cuda": []}
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix not in (".h", ".inl", ".cuh", ".cpp", ".cu"):
            continue
        cuda = path.parent.name == "cuda" or path.name.startswith("cuda")
        found["cuda" if cuda else "torch"].append(path.relative_to(ROOT).as_posix())
    return found


def build_toml() -> str:
    lists = {k: "\n".join(f'  "{path}",' for path in v) for k, v in sources().items()}
    return TEMPLATE.format(**lists)


def lay_out(folder: Path) -> None:
    """Raises FileExistsError: the folder is there already."""
    folder.mkdir(parents=True)
    for paths in sources().values():
        for path in paths:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, folder / path)
    ignored = shutil.ignore_patterns(*OWN)
    shutil.copytree(PACKAGE, folder / "torch-ext" / NAME, ignore=ignored)
    for path in ("build.toml", "hub/flake.nix", "LICENSE"):
        shutil.copy(ROOT / path, folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    if sys.argv[1] == "--write":
        (ROOT / "build.toml").write_text(build_toml())
    else:
        lay_out(Path(sys.argv[1]))
