"""`python -m bench.training`: criterion C7, a small transformer trained by every backend.

Each backend trains the adapters of `tiny_lm.Decoder` from the same start on the same batches with
the same dropout masks as eager PyTorch, which computes the formula product by product. Every run is
repeated with other masks. `loss diff` is the largest difference of a step's loss from eager's,
`eager diff` the smallest over pairs of masks of the largest that eager has by other masks alone,
`cosine` the lowest over the adapters of what training added to each, `gradient` the largest
relative difference of a gradient's size, which AdamW would not show. The limits are those of
tests/tolerance.py. Exits with 1 if a backend breaks one.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import operator
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import lora_kernels as lk

from . import report, shapes, tiny_lm

sys.path.append(str(report.ROOT / "tests"))
import tolerance

DROPOUT, SCALING, LEARNING_RATE = 0.1, 2.0, 2e-3
SIZES = tiny_lm.Sizes()
DTYPES = ("fp32", "bf16")
COLUMNS = {
    "first_loss": ("first", report.digits),
    "last_loss": ("last", report.digits),
    "loss_difference": ("loss diff", "{:.1e}".format),
    "eager_spread": ("eager diff", "{:.1e}".format),
    "cosine": ("cosine", "{:.6f}".format),
    "gradient_difference": ("gradient", "{:.1e}".format),
}


class Trained(NamedTuple):
    """One run: the loss of each step, and of each adapter what the steps did to it."""

    losses: list[float]
    added: dict[str, Tensor]  # final - initial value
    sizes: dict[str, float]  # root of the sum over the steps of its gradient's squares
    idle: list[str]  # whose gradient was once zero or not finite


def ours(backend: str, p: float = DROPOUT) -> tiny_lm.Linear:
    def linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, seed: Tensor) -> Tensor:
        return lk.fused_lora_linear(
            x, weight, a, b, scaling=SCALING, dropout_p=p, seed=seed, backend=backend
        )

    return linear


def eager(p: float = DROPOUT) -> tiny_lm.Linear:
    """PEFT's formula with the mask that our backends draw, and the adapters cast as they cast."""

    def linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, seed: Tensor) -> Tensor:
        mask = lk.dropout_mask(seed, x.shape, p, x.device)
        dropped = torch.where(mask, x / lk.keep_probability(p), 0)
        h = F.linear(dropped, a.to(x.dtype))
        return F.linear(x, weight) + F.linear(h, b.to(x.dtype)) * SCALING

    return linear


def train(
    linear: tiny_lm.Linear, dtype: torch.dtype, mask_seed: int, steps: int, device: str = "cpu",
    sizes: tiny_lm.Sizes | None = None, epsilon: float = 1e-8,
) -> Trained:  # fmt: skip
    """`steps` steps of AdamW; nothing but `linear` and `mask_seed` differs between two runs.

    AdamW's first step is the gradient's sign, which for an element near zero is decided by
    rounding. 200 steps forget that; a comparison after a few needs a larger `epsilon`.
    """
    sizes = sizes or SIZES
    model = tiny_lm.Decoder(sizes, dtype, linear, torch.Generator().manual_seed(0)).to(device)
    adapters = model.adapters()
    start = {name: p.detach().clone() for name, p in adapters.items()}
    optimizer = torch.optim.AdamW(adapters.values(), LEARNING_RATE, eps=epsilon, weight_decay=0.0)
    batches = tiny_lm.sentences(sizes, torch.Generator().manual_seed(1))
    losses, idle = [], set()
    squares = dict.fromkeys(adapters, 0.0)
    for step, batch in zip(range(steps), batches, strict=False):
        batch = batch.to(device)
        logits = model(batch[:, :-1], mask_seed, step).float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for name, p in adapters.items():
            size = 0.0 if p.grad is None else p.grad.double().square().sum().item()
            squares[name] += size
            # B starts at zero, and through it A's first gradient is exactly zero.
            if not 0 < size < float("inf") and not (step == 0 and name.endswith("lora_a")):
                idle.add(name)
        optimizer.step()
        losses.append(loss.item())
    added = {name: (p.detach() - start[name]).double().cpu() for name, p in adapters.items()}
    idle |= {name for name, change in added.items() if not change.any()}
    return Trained(losses, added, {n: s**0.5 for n, s in squares.items()}, sorted(idle))


def largest_difference(a: Trained, b: Trained) -> float:
    """Of the two losses of a step; NaN if any is."""
    return (torch.tensor(a.losses) - torch.tensor(b.losses)).abs().max().item()


def compare(runs: list[Trained], baseline: list[Trained]) -> dict:
    """What `tolerance.c7_violations` judges: runs of a backend beside eager's, by the same masks.

    The cosine is that of what training added, not of the adapter: A starts far from zero, and its
    start alone would pass for agreement.
    """
    pairs = list(zip(runs, baseline, strict=True))
    cosines = [
        F.cosine_similarity(a.added[name].flatten(), b.added[name].flatten(), dim=0)
        for a, b in pairs
        for name in b.added
    ]
    sizes = [a.sizes[name] / b.sizes[name] - 1 for a, b in pairs for name in b.sizes]
    others = [largest_difference(a, b) for a, b in itertools.combinations(baseline, 2)]
    return {
        "first_loss": runs[0].losses[0],
        "last_loss": runs[0].losses[-1],
        "loss_difference": _worst([largest_difference(a, b) for a, b in pairs]),
        "eager_spread": min(others),
        "cosine": torch.stack(cosines).min().item(),
        "gradient_difference": _worst(sizes),
        "idle": sorted({name for run in runs for name in run.idle}),
    }


def _worst(values: list[float]) -> float:
    return torch.tensor(values).abs().max().item()  # NaN if any is, which Python's max may lose


def serving(device: str, dtype: torch.dtype) -> list[str]:
    """Our backends that run here and serve this device and dtype."""
    x, weight, a, b = (torch.zeros(8, 8, device=device, dtype=dtype) for _ in range(4))
    found = []
    for name, missing in lk.backends().items():
        if missing is None:
            with contextlib.suppress(RuntimeError):
                lk.explain(x, weight, a, b, backend=name)
                found.append(name)
    return found


def group(dtype: str, names: list[str], args: argparse.Namespace, advance) -> dict:
    """Trains eager and every named backend with each mask seed, and judges the backends."""
    wanted = shapes.DTYPES[dtype]
    runs: dict[str, list[Trained]] = {}
    for name in ("eager", *names):
        linear = eager() if name == "eager" else ours(name)
        runs[name] = []
        for seed in range(tolerance.TRAINING_SEEDS):
            runs[name].append(train(linear, wanted, seed, args.steps, args.device))
            advance()
    rows = []
    for name, found in runs.items():
        rows.append({"name": name, **compare(found, runs["eager"])})
        if violations := tolerance.c7_violations(wanted, rows[-1]):
            rows[-1]["error"] = "; ".join(violations)
        # Nine digits tell every float32 from the next.
        rows[-1]["losses"] = [[float(f"{x:.9g}") for x in run.losses] for run in found]
    return {"dtype": dtype, "rows": rows}


# ---- the plot ------------------------------------------------------------------------------------


def plot(path: Path, groups: list[dict], machine: dict) -> None:
    """A column per dtype: losses on each other, and below the largest difference from eager's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(groups), squeeze=False, sharex=True, sharey="row", layout="constrained",
        figsize=(4.6 * len(groups) + 0.6, 5.6),
    )  # fmt: skip
    for (above, below), found in zip(axes.T, groups, strict=True):
        losses = {row["name"]: torch.tensor(row["losses"]) for row in found["rows"]}
        for place, (name, values) in enumerate(losses.items()):
            # The curves coincide: the later, the thinner, so that each can be seen.
            style = {"color": "#b8b8b8" if name == "eager" else f"C{place - 1}", "label": name}
            above.plot(values[0], linewidth=max(1.0, 5.0 - 1.3 * place), **style)
            if name != "eager":
                # Steps without a difference have no place on this scale: points show the others.
                off = (values - losses["eager"]).abs().amax(0)
                below.plot(off, linewidth=0.9, marker=".", markersize=3, **style)
        pairs = itertools.combinations(losses["eager"], 2)
        spread = torch.stack([(a - b).abs() for a, b in pairs]).amax(0)
        below.plot(spread, color="#b8b8b8", linewidth=0.9, label="eager, other masks")
        limit = tolerance.TRAINING_LOSS[shapes.DTYPES[found["dtype"]]]
        below.axhline(limit, color="black", linewidth=0.8, linestyle=":", label="limit")
        below.set_yscale("log", nonpositive="mask")
        below.set_xlabel("step", fontsize=8)
        above.set_title(found["dtype"], loc="left", fontsize=9)
        for axis in (above, below):
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8, length=0)
            axis.legend(frameon=False, fontsize=7)
    axes[0][0].set_ylabel("loss, first masks", fontsize=8)
    axes[1][0].set_ylabel("|loss - eager's|, largest over masks", fontsize=8)
    figure.suptitle(
        f"LoRA training by each backend on {machine['device_name']}, torch {machine['torch']}",
        x=0.01, ha="left", fontsize=9,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- the command ---------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dtype", type=shapes.listed(shapes.one_of("dtype", DTYPES)), default=list(DTYPES),
        metavar="DTYPE[,DTYPE]", help=f"of {', '.join(DTYPES)}; default: both",
    )  # fmt: skip
    parser.add_argument(
        "--backend", type=shapes.listed(shapes.one_of("backend", lk.backends())),
        metavar="NAME[,NAME]", help="default: all that serve the device and dtype",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=shapes.positive_int, default=tolerance.TRAINING_STEPS,
        help="C7 is about the default, %(default)s",
    )  # fmt: skip
    parser.add_argument("--threads", type=shapes.positive_int, help="of torch on the CPU")
    parser.add_argument(
        "--device", type=shapes.one_of("device", ("cpu", "cuda")),
        default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--json", type=report.output_path, default=report.OUT / "training.json")
    parser.add_argument("--plot", type=report.output_path, default=report.OUT / "training.png")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: got 'cuda', but torch sees no CUDA device; expected 'cpu'")
    return args


def main() -> int:
    args, console = parse(), Console()
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = report.environment(args.device)
    wanted = {dtype: serving(args.device, shapes.DTYPES[dtype]) for dtype in args.dtype}
    if args.backend:
        wanted = {d: [n for n in names if n in args.backend] for d, names in wanted.items()}
    settings = {
        "sizes": SIZES._asdict(), "rank": tiny_lm.RANK, "dropout": DROPOUT, "scaling": SCALING,
        "steps": args.steps, "mask_seeds": tolerance.TRAINING_SEEDS, "optimizer": "AdamW",
        "learning_rate": LEARNING_RATE, "adapter_dtype": "fp32",
        "limits": {
            "loss_difference": {d: tolerance.TRAINING_LOSS[shapes.DTYPES[d]] for d in args.dtype},
            "cosine": tolerance.TRAINING_COSINE, "gradient_difference": tolerance.TRAINING_GRADIENT,
        },
    }  # fmt: skip
    groups = []
    runs = tolerance.TRAINING_SEEDS * sum(1 + len(names) for names in wanted.values())
    with report.progress(console) as bar:
        task = bar.add_task("training", total=runs)
        for dtype, names in wanted.items():
            groups.append(group(dtype, names, args, lambda: bar.advance(task)))
            title = f"{args.steps} steps, {dtype}, {tolerance.TRAINING_SEEDS} sets of masks"
            console.print(report.table(title, groups[-1]["rows"], COLUMNS))
            report.write(args.json, "training", machine, settings, {"groups": groups})
    failures = report.failures(groups, operator.itemgetter("dtype"))
    plot(args.plot, groups, machine)
    console.print(f"wrote {args.plot}")
    content = {"groups": groups, "failures": failures}
    report.write(args.json, "training", machine, settings, content)
    console.print(f"wrote {args.json}")
    return report.conclude(console, failures)


if __name__ == "__main__":
    sys.exit(main())
