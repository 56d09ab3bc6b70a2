"""What each profile of the GPU suite runs: its stages' time limits, and their arguments."""

from __future__ import annotations

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Seconds, in all less than 9.5 minutes. What a stage leaves is the next one's: a probe that finds
# torch in the disk's cache leaves the build most of its own. Timed tables take at most half.
LIMITS = {
    "probe": 50, "build": 55, "tests": 95,
    "memcheck": 32, "racecheck": 32, "initcheck": 32, "synccheck": 32,
    "kernels": 34, "gemm": 42, "backward": 30, "group": 18, "decode": 18, "layers": 50, "dram": 30,
    "selfcheck": 18,
}  # fmt: skip
TRITON_LIMITS = {  # where tests and selfcheck compile most of the time
    "probe": 50, "build": 55, "triton": 190, "selfcheck-triton": 130, "tune-triton": 140,
}  # fmt: skip
MODEL_LIMITS = {"probe": 50, "build": 55, "model": 200, "finetune": 150}
SWEEP_LIMITS = {
    "probe": 50, "build": 55, "sweep": 190, "steps": 150, "memory": 60, "counters": 60,
}  # fmt: skip
PROFILES = {
    "cuda": LIMITS, "sweep": SWEEP_LIMITS, "model": MODEL_LIMITS, "triton": TRITON_LIMITS,
}  # fmt: skip
FLAGS = {
    "cuda": "the CUDA kernels: the default",
    "sweep": "every layer, rank and length, memory and counters",
    "model": "a decoder layer and a fine-tune under PEFT",
    "triton": "the Triton kernels",
}

# What rows of dispatch.json are made of. The tests and sanitizers check the operators.
SELFCHECK = [
    "lora_kernels", "selfcheck", "--shapes", "few", "--dtype", "bf16", "--no-operators",
    "--no-store", "--seconds", "4.5",
]  # fmt: skip
SELFCHECK_TRITON = [
    "lora_kernels", "selfcheck", "--backend", "triton", "--shapes", "few", "--dtype", "bf16,fp16",
    "--no-operators", "--no-store", "--seconds", "95",
]  # fmt: skip
# Compilation, by Triton or by torch, has time in the profiles `triton` and `sweep`.
BACKENDS = ["--backend", "cuda,composed"]
LAYERS = ["bench", "--skip", "compiled", *BACKENDS]
MEMORY = ["bench.bench_memory", *BACKENDS]
TUNE = ["bench.tune_triton", "--dry-run", "--seconds", "100"]
LARGE = ("llama-3.1-8b", "qwen2.5-32b", "llama-3.1-70b")
SWEEP = [
    "bench.bench_gemm", "--preset", ",".join(LARGE), "--tokens", "2048,4096,8192,16384",
    "--rank", "8,16,32,64,128", "--seconds", "0.1",
]  # fmt: skip
# The layers of K = N = 4096, 5120 and 8192 and those of grouped queries.
STEPS = [
    "bench", "--preset", ",".join(f"{name}:{layer}" for name in LARGE for layer in ("q/o", "k/v")),
    "--mode", "fwd+bwd", *BACKENDS,
]  # fmt: skip
MODEL = [
    "bench.bench_model", *BACKENDS, "--adapters", "same,fp32", "--seconds", "12",
]  # fmt: skip
FINETUNE = ["bench.bench_finetune", *BACKENDS]
