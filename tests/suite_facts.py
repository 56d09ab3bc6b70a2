"""What benchmarks leave, made up, for the tests of the suite and of what is published."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

from lora_kernels.triton_kernels import digest

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import gpu_suite, profiles, provenance
from bench.stages import Finished


def gemm_group(rank: int, **over: float) -> dict:
    """A table of bench_gemm: `over` are times over the plain GEMM's, which is 1.1 of vendor's."""
    shape = {"label": "8x8", "m": 8, "n": 8, "k": 8, "rank": rank, "dtype": "bf16", "dropout": 0.1}
    rows = [{"name": "vendor", "over_plain": 1 / 1.1, "over_vendor": 1.0}]
    for name, ratio in {"plain": 1.0, **over}.items():
        rows.append({"name": name, "plan": "tile", "over_plain": ratio, "over_vendor": 1.1 * ratio})
    rows.append({"name": "addmm", "over_plain": 9.0, "over_vendor": 9.9})
    return shape | {"left_out": {}, "rows": rows}


def group_table(p: float, **more) -> dict:
    """A table of bench_group: separate calls 1.2 of frozen, the group 1.1."""
    over = {"frozen": 1.0, "eager": 1.5, "cuda apart": 1.2, "cuda group": 1.1}
    rows = [
        {"name": name, "over_frozen": ratio, "of_apart": 1.1 / 1.2 if "group" in name else None}
        for name, ratio in over.items()
    ]
    about = {"label": "model q, k, v", "rank": 16, "dtype": "bf16", "dropout": p, "mode": "forward"}
    return about | {"rows": rows} | more


def timed(name: str, ms: float, **more) -> dict:
    return {"name": name, "median_ms": ms, "q1_ms": ms, "q3_ms": ms, **more}


MACHINE = {"device": "cuda", "device_name": "NVIDIA Test (1)", "torch": "0"}
LAYER = {"label": "model q/o", "m": 8, "n": 8, "k": 8, "rank": 1, "dtype": "bf16"}


def layers_of(automatic: str, p: float = 0.0, **about) -> dict:
    """A result of `python -m bench`."""
    rows = [timed(name, 1.0) for name in ("frozen", "peft", "addmm", "composed")]
    rows.append(timed("cuda", 0.9, ratio_to_frozen=0.9, speedup_over_peft=1.5))
    layer = {"mode": "fwd+bwd", "dropout": p, "automatic": automatic, **LAYER, **about}
    return {"environment": MACHINE, "groups": [layer | {"rows": rows}]}


def make_out(folder: Path) -> Path:
    """An OUT in which every stage passed; its numbers are made up."""
    folder.mkdir()
    call = {"kernel": "fused_gemm", "what": "y", "dropout": 0.1, **LAYER}
    rates = {"kernel": 2.0, "composed": 1.9, "torch": 1.8, "frozen": 2.1, "copy": None}
    rows = [timed(name, 1.0, tflops=rate, gb_per_s=9.0) for name, rate in rates.items()]
    kernels = {"environment": MACHINE, "groups": [call | {"rows": rows}]}
    layers = layers_of("composed")
    record = {
        "schema": gpu_suite.SCHEMA, "finished": True, "commit": "abc", "dirty": False,
        "sources_sha256": provenance.sources_hash(), "binary_sha256": "0",
        "device": {"device_name": MACHINE["device_name"]},
        "stages": [{"name": name, "status": "passed"} for name in profiles.LIMITS],
    }  # fmt: skip
    groups = [gemm_group(4, one_launch=1.01, two_launches=1.1), gemm_group(8, two_launches=1.2)]
    gemm = {"environment": MACHINE, "groups": groups}
    groups = [gemm_group(16, passes=1.2, one_grid=1.05), gemm_group(128, passes=1.3)]
    backward = {"environment": MACHINE, "groups": groups}
    group = {"environment": MACHINE, "groups": [group_table(p) for p in (0.0, 0.1)]}
    files = {"kernels": kernels, "layers": layers, "gemm": gemm, "backward": backward}
    files |= {"group": group, "suite": record, "selfcheck": {"of": "cuda"}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    with tarfile.open(folder / "logs.tar.gz", "w:gz") as tar:
        decode = folder / "decode.json"
        decode.write_text(json.dumps(backward))
        tar.add(decode, "logs/decode.json")
        decode.unlink()
    return folder


def other_out(folder: Path, profile: str, files: dict[str, dict], **more) -> Path:
    """An OUT of another profile, on the device of `out`, in which every stage passed."""
    folder.mkdir()
    record = {
        "schema": gpu_suite.SCHEMA, "finished": True, "commit": "abc", "dirty": False,
        "sources_sha256": provenance.sources_hash(), "binary_sha256": None, "profile": profile,
        "device": {"device_name": "NVIDIA Test (1)", "triton": "3.7.1"},
        "stages": [{"name": name, "status": "passed"} for name in profiles.PROFILES[profile]],
    }  # fmt: skip
    for name, content in {"suite": record | more, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def make_out_triton(folder: Path) -> Path:
    files = {"selfcheck-triton": {"of": "the suite of triton"}}
    digests = {"sources_sha256": "0", "triton_sha256": digest.of_version("3.7.1")}
    return other_out(folder, "triton", files, **digests)


def make_out_model(folder: Path) -> Path:
    rows = [timed(name, 1.0, of_peft=1.0) for name in ("peft", "applied")]
    case = {"model": "m", "tokens": 8, "dtype": "bf16", "adapters": "same", "rank": 1, "dropout": 0}
    model = {"environment": MACHINE, "groups": [case | {"rows": rows}]}
    rows = [row | {"last_loss": 1.0, "tokens_per_s": 1000.0, "peak_mib": 2.0} for row in rows]
    table = case | {"steps": 9, "first_loss": 2.0, "rows": rows}
    finetune = {"environment": MACHINE, "groups": [table]}
    return other_out(folder, "model", {"model": model, "finetune": finetune})


def make_out_sweep(folder: Path) -> Path:
    """Rank 64 misses its goal, of 1.03; the step misses none."""
    tables = [
        gemm_group(rank, one_launch=1.01, two_launches=over) | {"m": m}
        for rank, over in ((16, 1.0), (64, 1.5)) for m in (8, 16)
    ]  # fmt: skip
    tables[-1]["rows"] = gemm_group(64, one_launch=1.04, two_launches=1.05)["rows"]
    rows = [
        {"name": name, "automatic": False, "saved_per_row": 32.0, "peak_bytes": 4, "peak_mib": 4e-6}
        for name in ("frozen", "eager", "cuda")
    ]
    memory = {"environment": MACHINE, "groups": [LAYER | {"dropout": 0.1, "rows": rows}]}
    steps = layers_of("cuda", 0.1, n=4096, k=4096)
    sweep = {"environment": MACHINE, "groups": tables}
    return other_out(folder, "sweep", {"sweep": sweep, "steps": steps, "memory": memory})


MAKERS = {
    "cuda": make_out, "sweep": make_out_sweep, "model": make_out_model, "triton": make_out_triton,
}  # fmt: skip


def finished(tmp_path: Path, text: str, code: int = 0) -> Finished:
    """A stage that printed `text`."""
    log = tmp_path / "stage.log"
    log.write_text(text)
    return Finished(code, log)
