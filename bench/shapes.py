"""The layers that are timed, and the command-line arguments that choose among them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# model -> layer -> (N, K) = (out_features, in_features); layers of one shape share a name.
MODELS = {
    "llama-3.1-8b": {
        "q/o": (4096, 4096),
        "k/v": (1024, 4096),
        "gate/up": (14336, 4096),
        "down": (4096, 14336),
    },
    "llama-3.1-70b": {
        "q/o": (8192, 8192),
        "k/v": (1024, 8192),
        "gate/up": (28672, 8192),
        "down": (8192, 28672),
    },
    "qwen2.5-32b": {
        "q/o": (5120, 5120),
        "k/v": (1024, 5120),
        "gate/up": (27648, 5120),
        "down": (5120, 27648),
    },
    "minilm": {"q/k/v/o": (384, 384), "up": (1536, 384), "down": (384, 1536)},
}


TOKENS = {"cpu": 1024, "cuda": 8192}  # rows of x, where no --tokens are given


class Shape(NamedTuple):
    """x [m, k], weight [n, k]."""

    label: str
    m: int
    n: int
    k: int


class Case(NamedTuple):
    shape: Shape
    dtype: str  # a key of DTYPES
    rank: int

    def __str__(self) -> str:
        label, m, n, k = self.shape
        return f"{label}  M={m} N={n} K={k} r={self.rank} {self.dtype}"


def flops(case: Case, mode: str) -> tuple[int, int]:
    """(frozen GEMMs alone, with the LoRA GEMMs) of one call; 2 per multiply-add.

    The backward pass computes dx, dA and dB: one frozen GEMM and four of rank r.
    """
    (_, m, n, k), r = case.shape, case.rank
    frozen, lora = 2 * m * n * k, 2 * m * r * (n + k)
    return (frozen, frozen + lora) if mode == "forward" else (2 * frozen, 2 * frozen + 3 * lora)


def preset(name: str) -> dict[str, tuple[int, int]]:
    """label -> (N, K) of all layers of `llama-3.1-8b`, or of one with `llama-3.1-8b:down`."""
    model, _, layer = name.partition(":")
    if model not in MODELS:
        raise argparse.ArgumentTypeError(
            f"unknown preset {name!r}; expected MODEL or MODEL:LAYER with MODEL one of "
            f"{', '.join(MODELS)}"
        )
    layers = MODELS[model]
    if layer and layer not in layers:
        raise argparse.ArgumentTypeError(
            f"preset {name!r}: {model} has no layer {layer!r}; expected one of {', '.join(layers)}"
        )
    return {f"{model} {key}": nk for key, nk in layers.items() if layer in ("", key)}


def default_cases(device: str, rank: int) -> list[Case]:
    """CUDA: every layer of Llama-3.1-8B at 8192 rows. CPU: MiniLM, and one Llama layer at 64 rows.

    bf16 on the CPU has 256 rows: without bf16 instructions the vendor's `dy @ W` is so slow that
    more rows would take minutes.
    """

    def cases(name: str, m: int, dtype: str) -> list[Case]:
        return [Case(Shape(label, m, *nk), dtype, rank) for label, nk in preset(name).items()]

    if device == "cuda":
        return cases("llama-3.1-8b", 8192, "bf16")
    return (
        cases("minilm", 1024, "fp32")
        + cases("llama-3.1-8b:q/o", 64, "fp32")
        + cases("minilm", 256, "bf16")
    )


# ---- arguments -----------------------------------------------------------------------------------


def listed(parse: Callable) -> Callable:
    """An argparse type: comma-separated items, each read by `parse`."""
    return lambda text: [parse(item.strip()) for item in text.split(",")]


def one_of(what: str, names) -> Callable:
    """An argparse type: one of `names`."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(
                f"unknown {what} {text!r}; expected one of {', '.join(names)}"
            )
        return text

    return parse


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a positive integer")
    return int(text)


def _float(text: str, accept: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not accept(value):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected {expected}")
    return value


def probability(text: str) -> float:
    return _float(text, lambda p: 0 <= p < 1, "a probability in [0, 1)")


def positive_float(text: str) -> float:
    return _float(text, lambda value: 0 < value < math.inf, "a positive number")


def _shape(text: str) -> Shape:
    sizes = text.split(",")
    if len(sizes) != 3:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected M,N,K, for example 8192,4096,4096"
        )
    m, n, k = map(positive_int, sizes)
    return Shape(f"{n}x{k}", m, n, k)


def _add_arguments(parser: argparse.ArgumentParser, seconds: dict[str, float], ranks: str) -> None:
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--preset", type=listed(preset), action="extend", metavar="NAME[,NAME]", default=[],
        help="layers of a model, MODEL or MODEL:LAYER (--list shows them)",
    )  # fmt: skip
    parser.add_argument(
        "--shape", type=_shape, action="append", metavar="M,N,K", default=[],
        help="x [M, K] times weight [N, K]; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=listed(positive_int), metavar="M[,M]",
        help="rows of x for --preset; default 8192 on CUDA, 1024 on a CPU",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", type=listed(one_of("dtype", DTYPES)), metavar="DTYPE[,DTYPE]",
        help=f"of {', '.join(DTYPES)}; default bf16 on CUDA, fp32 on a CPU",
    )  # fmt: skip
    parser.add_argument(
        "--rank", type=listed(positive_int), metavar="R[,R]", default=ranks,
        help="default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--dropout", type=listed(probability), metavar="P[,P]", default="0,0.1",
        help="default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=positive_int, default=40,
        help="most samples of one contender (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=positive_float,
        help="time budget of one comparison; one too slow for it gets fewer samples, at least 3; "
        f"default {seconds['cuda']:g} on CUDA, {seconds['cpu']:g} on a CPU",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=positive_int,
        help="of torch on the CPU; where other processes run, one thread suffers least from them",
    )  # fmt: skip
    parser.add_argument(
        "--device", type=one_of("device", ("cpu", "cuda")), default="cuda" if cuda else "cpu",
        help="default: %(default)s",
    )  # fmt: skip


def parse(
    parser: argparse.ArgumentParser, seconds: dict[str, float], ranks: str = "16"
) -> argparse.Namespace:
    """The parser's arguments and those of `cases` and `timing.interleave`, parsed and completed.

    `seconds` is the default of --seconds by device, `ranks` that of --rank.
    """
    _add_arguments(parser, seconds, ranks)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: got 'cuda', but torch sees no CUDA device; expected 'cpu'")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.tokens = args.tokens or [TOKENS[args.device]]
    args.seconds = args.seconds or seconds[args.device]
    return args


def cases(
    args: argparse.Namespace, default: Callable[[str, int], list[Case]] = default_cases
) -> list[Case]:
    """What the arguments ask for: layers by dtypes by ranks, or the device's default."""
    presets = [layer for layers in args.preset for layer in layers.items()]
    shapes = [Shape(label, m, *nk) for label, nk in presets for m in args.tokens] + args.shape
    if not shapes:
        found = [case for rank in args.rank for case in default(args.device, rank)]
        return [case for case in found if args.dtype is None or case.dtype in args.dtype]
    dtypes = args.dtype or (["bf16"] if args.device == "cuda" else ["fp32"])
    return [Case(shape, dtype, rank) for shape in shapes for dtype in dtypes for rank in args.rank]
