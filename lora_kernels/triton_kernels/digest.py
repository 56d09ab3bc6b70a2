"""What the Triton kernels are made of, as one hash: their files, and Triton, which compiles them.

A measurement holds for one hash, as for the CUDA kernels (csrc/digest.py): comments count too.
"""

import contextlib
import hashlib
from importlib import metadata
from pathlib import Path

DISTRIBUTIONS = ("triton", "triton-rocm", "pytorch-triton-rocm", "triton-windows")
FOLDER = Path(__file__).parent


def sources() -> str:
    """The hash of this package with the Triton that is installed; "" if none is."""
    version = triton_version()
    return of_version(version) if version else ""


def triton_version() -> str:
    """Of the Triton that is installed, under any of its names; "" if none is. Imports nothing."""
    for name in DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return ""


def of_version(version: str, folder: Path = FOLDER) -> str:
    """SHA-256, in hexadecimal, of all *.py and *.json, by path and content, and Triton's version.

    Args:
        version: of Triton.
        folder: where the kernels are.
    """
    files = [path for kind in ("*.py", "*.json") for path in folder.rglob(kind)]
    digest = hashlib.sha256(f"triton {version}\0".encode())
    for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
