"""What was measured: the commit, and hashes of the sources and of the binary.

Imports the standard library alone: a broken torch must not keep a record from being written.
"""

from __future__ import annotations

import hashlib
import os
import runpy
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BINARY = ROOT / "lora_kernels" / "_C.abi3.so"


def commit() -> dict:
    """commit and dirty, by git or LORA_KERNELS_COMMIT; dirty is None where nobody knows."""
    found = [
        _output("git", "-C", str(ROOT), *arguments)
        for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain"))
    ]
    if (ROOT / ".git").exists() and None not in found:
        return {"commit": found[0], "dirty": bool(found[1])}
    named = os.environ.get("LORA_KERNELS_COMMIT")
    if not named:
        return {"commit": "unknown", "dirty": None}
    return {"commit": named.removesuffix("-dirty"), "dirty": named.endswith("-dirty")}


def _output(*command: str) -> str | None:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return ran.stdout.strip()


def sources_hash(root: Path = ROOT) -> str:
    """SHA-256 of every file of csrc, by path and content."""
    digest = hashlib.sha256()
    for path in sorted((root / "csrc").rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def binary_hash() -> str | None:
    """SHA-256 of lora_kernels/_C.abi3.so, None if there is none."""
    return hashlib.sha256(BINARY.read_bytes()).hexdigest() if BINARY.exists() else None


def triton_hash() -> str:
    """Of the Triton kernels and the installed Triton, "" without one; imports neither."""
    return runpy.run_path(str(ROOT / "lora_kernels/triton_kernels/digest.py"))["sources"]()


def is_current(binary: Path = BINARY, root: Path = ROOT) -> bool:
    """Whether the binary has CUDA kernels and is no older than all that it is built from."""
    if not binary.exists() or b"nv_fatbin" not in binary.read_bytes():
        return False
    sources = [root / "setup.py", *(p for p in (root / "csrc").rglob("*") if p.is_file())]
    return binary.stat().st_mtime >= max(source.stat().st_mtime for source in sources)
