"""`python -m bench.bench_overhead`: host time of a call, on a layer too small for anything else.

One 8x8 linear with bias at r = 8 and 8 rows, fp32 on the CPU, one thread, the garbage collector
off; where there is a GPU, on that in bf16 too, with the backends that it has, each sample begun on
an idle device. Contenders run in turns, `--calls` calls a sample. Times are microseconds per call:
median, minimum, and the ratio of medians to PEFT's own peft.tuners.lora.Linear. In `forward` a
graph is recorded; `fwd+bwd` ends in y.backward(dy), which accumulates into .grad.

The automatic choice alone is timed too, by a stand-in for a device with measured evidence: with an
empty table, where no shape is looked at, and with a full one, for a shape seen before and for one
that is new. So are the launchers of the Triton kernels, in a process of their own and by a driver
that launches nothing (`bench.triton_launch`), where Triton is installed. Figures count only from a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels import backend as backends
from lora_kernels import composed, dispatch, dropout, ops
from lora_kernels.shape_classes import EDGES, PASSES, Point, classes
from lora_kernels.triton_kernels import device as triton_device
from lora_kernels.triton_kernels import digest

from . import report, shapes, timing

SIZE = 8  # rows, in_features, out_features and rank
MODES = ("forward", "no_grad", "fwd+bwd")
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
ON_GPU = ("cuda", "triton")  # backends that are forced there


def peft_linear(linear: nn.Linear, p: float) -> nn.Module | None:
    """PEFT's layer around `linear`; None if peft is not installed."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        return None
    config = LoraConfig(r=SIZE, lora_alpha=SIZE, lora_dropout=p, target_modules=["0"])
    return inject_adapter_in_model(config, nn.Sequential(linear))[0]


def layers(p: float, x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is called with such an x, by name, all in training mode."""

    def linear() -> nn.Linear:
        return nn.Linear(SIZE, SIZE, device=x.device, dtype=x.dtype)

    frozen = linear().requires_grad_(False)
    module = lk.LoRALinear.from_linear(frozen, SIZE, lora_dropout=p)
    operands = module.weight, module.lora_a, module.lora_b, module.bias

    def function(backend: str | None) -> Callable[[Tensor], Tensor]:
        return lambda x: lk.fused_lora_linear(
            x, *operands, scaling=1.0, dropout_p=p, backend=backend
        )

    fused = peft_linear(linear(), p)
    found = {
        "peft Linear": peft_linear(linear(), p),
        "peft Linear, applied": None if fused is None else lk.apply(fused),
        "nn.Linear, frozen": frozen,
        "LoRALinear": module,
        "fused_lora_linear": function(None),
        "backend composed": function("composed"),
    }
    if x.device.type == "cuda":
        usable = [name for name in ON_GPU if lk.backends()[name] is None]
        found |= {f"backend {name}": function(name) for name in usable}
    return {name: layer for name, layer in found.items() if layer is not None}


def calls(mode: str, p: float, x: Tensor, dy: Tensor) -> dict[str, Callable[[], object]]:
    """The timed callables. A frozen linear whose x needs no gradient has no backward pass."""

    def bind(layer: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        if mode == "fwd+bwd":
            return lambda: layer(x).backward(dy)
        if mode == "forward":
            return lambda: layer(x)

        def without_grad():
            with torch.no_grad():
                layer(x)

        return without_grad

    found = {name: bind(layer) for name, layer in layers(p, x).items()}
    if mode == "fwd+bwd" and not x.requires_grad:
        del found["nn.Linear, frozen"]
    return found


class IdleDeviceTimer(timing.HostTimer):
    """Begins on an idle device: waiting for room in its queue is not the host's work."""

    def __call__(self, call: timing.Call) -> float:
        torch.cuda.synchronize()
        return super().__call__(call)


def measure(
    found: dict[str, Callable[[], object]], args: argparse.Namespace, device: str = "cpu"
) -> list[dict]:
    """Rows in microseconds, with the ratio to PEFT's median if PEFT is there. Calls on `device`."""
    for call in found.values():
        for _ in range(args.calls):
            call()
    timer = (timing.HostTimer if device == "cpu" else IdleDeviceTimer)(args.calls)
    return rows_of(timing.interleave(found, timer, args.rounds))


def rows_of(timed: dict[str, timing.Summary]) -> list[dict]:
    """Rows of a table, in microseconds."""
    peft = timed["peft Linear"].median_ms if "peft Linear" in timed else None
    return [
        {
            "name": name,
            "median_us": 1e3 * summary.median_ms,
            "min_us": 1e3 * summary.min_ms,
            "iqr_us": 1e3 * summary.iqr_ms,
            "ratio_to_peft": summary.median_ms / peft if peft else None,
        }
        for name, summary in timed.items()
    ]


def adopted(args: argparse.Namespace, p: float) -> list[dict]:
    """Groups like main's, of PEFT's layer and the applied one as trainers set them up: a 16-bit
    base with fp32 adapters, and autocast over an fp32 one. On the CPU; none without PEFT."""
    groups: list[dict] = []
    bf16 = torch.bfloat16
    for setting, base, amp in (
        ("bf16 base, fp32 adapters", bf16, False),
        ("autocast, fp32 base", torch.float32, True),
    ):
        own, fused = (peft_linear(nn.Linear(SIZE, SIZE, dtype=base), p) for _ in range(2))
        if own is None or fused is None:
            return []
        found = {"peft Linear": own, "peft Linear, applied": lk.apply(fused)}
        for layer in found.values():
            layer.lora_A.float(), layer.lora_B.float()  # type: ignore[operator, union-attr]
        x = torch.randn(SIZE, SIZE, dtype=base, requires_grad=True)
        dy = torch.randn(SIZE, SIZE, dtype=bf16)
        for mode in ("forward", "fwd+bwd"):

            def call(layer, x=x, dy=dy, amp=amp, backward=mode == "fwd+bwd"):
                with torch.autocast("cpu", bf16, enabled=amp):
                    y = layer(x)
                return y.backward(dy) if backward else y

            calls = {name: functools.partial(call, layer) for name, layer in found.items()}
            about = dict(mode=mode, device="cpu", dropout=p, x_requires_grad=True, setting=setting)
            groups.append(about | {"rows": measure(calls, args)})
    return groups


def full_table() -> dispatch.Evidence:
    """Evidence that has won every class of float32: its times are made up, its size is not."""
    sizes = itertools.product(*EDGES.values())
    points = [
        Point(m, n, k, r, dropped, "float32", of_pass, 1.0, 2.0, right=True)
        for (m, n, k, r), dropped, of_pass in itertools.product(sizes, (False, True), PASSES)
    ]
    return dispatch.Evidence([dispatch.Source("a stand-in", tuple(classes(points)), local=True)])


def choices(args: argparse.Namespace) -> list[dict]:
    """Rows of the automatic choice's host time, as `fused_lora_linear` makes it."""
    x = torch.randn(64, 1024, requires_grad=True)
    weight, lora_a = torch.randn(1024, 1024), torch.randn(16, 1024)
    facts = (x, weight, lora_a, 1.0, 0.0, False, (x, lora_a))
    rows: list[dict] = []
    for name, evidence in (("empty table", dispatch.Evidence()), ("full table", full_table())):
        stand_in = lk.Backend(
            "stand_in", "", composed.forward, composed.backward,
            evidence=lambda device, found=evidence: found,
        )  # fmt: skip
        backends.register(stand_in, before="cpu")
        found = {name: lambda: ops.plan_of("", *facts)}
        if evidence.sources:

            def new_shape():
                backends._chosen.cache_clear()
                ops.plan_of("", *facts)

            found[f"{name}, new shape"] = new_shape
        rows += measure(found, args)
        backends.unregister("stand_in")
    return rows


def triton_launches(args: argparse.Namespace) -> list[dict]:
    """Rows of the host time of Triton's launchers; none without a Triton that serves."""
    version = digest.triton_version()
    if not version or tuple(map(int, version.split(".")[:2])) < triton_device.OLDEST:
        return []
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.triton_launch", str(args.calls), str(args.rounds)]
    ran = subprocess.run(
        command, cwd=report.ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    summaries = json.loads(ran.stdout).items()
    return rows_of({f"triton launch: {name}": timing.Summary(**found) for name, found in summaries})


def cell(row: dict) -> str:
    ratio = row["ratio_to_peft"]
    text = f"{row['median_us']:.3g} ({row['min_us']:.3g})"
    return text if ratio is None else f"{text} {report.times(ratio)}"


def joined(groups: list[dict]) -> list[dict]:
    """One table row per contender, out of one group per mode."""
    rows: dict[str, dict] = {}
    for group in groups:
        for row in group["rows"]:
            rows.setdefault(row["name"], {"name": row["name"]})[group["mode"]] = row
    return list(rows.values())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bench_overhead",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--rounds", type=shapes.positive_int, default=40, help="samples (default: %(default)s)"
    )
    parser.add_argument(
        "--calls", type=shapes.positive_int, default=60, help="a sample's (default: %(default)s)"
    )
    parser.add_argument(
        "--dropout", type=shapes.listed(shapes.probability), metavar="P[,P]", default="0,0.1",
        help="default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--json", type=report.output_path, default=report.OUT / "overhead.json")
    return parser.parse_args()


def main() -> int:
    args, console = parse(), Console()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    machine = report.environment("cpu")
    if machine["peft"] is None:
        console.print("peft is not installed (pip install peft): no PEFT row, no ratio to it")
    groups: list[dict] = []
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    with report.progress(console) as bar:
        task = bar.add_task("host time", total=2 * len(MODES) * len(args.dropout) * len(devices))
        for device, p, x_grad in itertools.product(devices, args.dropout, (True, False)):
            like = dict(device=device, dtype=DTYPES[device])
            x = torch.randn(SIZE, SIZE, **like, requires_grad=x_grad)
            dy = torch.randn(SIZE, SIZE, **like)
            table = []
            for mode in MODES:
                rows = measure(calls(mode, p, x, dy), args, device)
                about = dict(mode=mode, device=device, dropout=p, x_requires_grad=x_grad)
                table.append(about | {"rows": rows})
                bar.advance(task)
            needs = "x requires grad" if x_grad else "x without grad"
            title = f"us per call, median (min) and x peft: {device}, dropout {p:g}, {needs}"
            console.print(
                report.table(title, joined(table), {mode: (mode, cell) for mode in MODES}), ""
            )
            groups += table

    settings_of_trainers = [group for p in args.dropout for group in adopted(args, p)]
    for (setting, p), found in itertools.groupby(
        settings_of_trainers, key=lambda group: (group["setting"], group["dropout"])
    ):
        table = list(found)
        title = f"us per call, median (min) and x peft: {setting}, dropout {p:g}"
        columns = {group["mode"]: (group["mode"], cell) for group in table}
        console.print(report.table(title, joined(table), columns), "")

    cpu = torch.device("cpu")
    seed = measure({"draw_seed": lambda: dropout.draw_seed(cpu)}, args)[0]
    console.print(
        f"the seed draw, part of every call with dropout: {seed['median_us']:.1f} us "
        f"(min {seed['min_us']:.1f})"
    )
    chosen = choices(args)
    columns = {"median_us": ("median", report.digits), "min_us": ("min", report.digits)}
    console.print(report.table("us per automatic choice", chosen, columns))
    launches = triton_launches(args)
    if launches:
        console.print(report.table("us per launcher, without the driver", launches, columns))
    else:
        console.print("no Triton, or one that is too old: no row of its launchers")
    settings = {"rounds": args.rounds, "calls_per_sample": args.calls, "size": SIZE}
    content = {
        "groups": groups,
        "as_trainers_do": settings_of_trainers,
        "draw_seed": seed,
        "automatic_choice": chosen,
    }
    content["triton_launches"] = launches
    return report.finish(console, args.json, "overhead", machine, settings, content)


if __name__ == "__main__":
    sys.exit(main())
