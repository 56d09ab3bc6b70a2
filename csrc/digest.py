"""What the CUDA kernels and their plans are made of, as one hash; no import but the library's.

A measurement holds for one hash: plans choose among kernels, so a change of any of these files may
change what a call runs. Comments count too: a rule without exceptions needs no judgement.
"""

import hashlib
from pathlib import Path

HEADERS = ("lora.h", "philox.h")


def kernel_sources(csrc: Path) -> str:
    """SHA-256, in hexadecimal, of lora.h, philox.h and all of cuda/, by path and content."""
    files = [csrc / name for name in HEADERS]
    files += (path for path in (csrc / "cuda").rglob("*") if path.is_file())
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.relative_to(csrc).as_posix()):
        digest.update(f"{path.relative_to(csrc).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
