"""`python -m bench.bench_finetune`: a small model tuned by PEFT, with and without the one line.

A Llama of bytes learns Python from this interpreter's standard library, with all its weights; then
they are frozen, and LoRA adapts it to the English of Python's reference, which comes with every
interpreter too: nothing is downloaded.

  peft      PEFT's own layers
  applied   the same after `lora_kernels.apply`, with the backend that each call chooses
  NAME      the same, with the backend NAME

All start from the same adapters, see the same batches, and take turns step by step; each draws its
own dropout. `held out` is the loss on text that none has seen, `of peft` the time of a step over
peft's. What learns less or more than peft by over 5 % of what peft learns is an error, and so is a
layer that is not fused.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import lora_kernels as lk

from . import bench_model, contenders, report, shapes, timing

SCALE = {  # hidden, intermediate, heads, heads of k and v, layers; batch, length
    "cuda": ((1024, 2816, 16, 4, 8), (16, 1024)),
    "cpu": ((192, 512, 6, 2, 3), (8, 128)),
}
BASE_STEPS, STEPS = {"cuda": 300, "cpu": 120}, {"cuda": 200, "cpu": 60}
BASE_RATE, RATE = 1e-3, 1e-3  # AdamW's
WARM_UP_STEPS = 5  # that count for the loss but not for the time
HELD_OUT, HELD_OUT_BATCHES = 0.1, 4  # share of the text; batches of it
LEARNT = 0.05  # how far from peft's may be what a contender learns, relative
TITLE = "{model}  {steps} steps {dtype}, adapters {adapters}, r={rank} dropout {dropout:g}"
COLUMNS = {
    "last_loss": ("held out", "{:.4f}".format),
    "median_ms": ("time ms", report.digits),
    "iqr_ms": ("IQR ms", report.digits),
    "of_peft": ("of peft", "{:.3f}x".format),
    "tokens_per_s": ("tokens/s", "{:,.0f}".format),
    "peak_mib": ("peak MiB", report.digits),
}


# ---- the text ------------------------------------------------------------------------------------


class Text(NamedTuple):
    """Bytes to learn, and some of the same kind to be judged by."""

    seen: Tensor
    held_out: Tensor


def texts() -> tuple[Text, Text]:
    """(Python, English): the sources and the reference that come with this interpreter."""
    library = Path(sysconfig.get_path("stdlib"))
    python = b"".join(path.read_bytes() for path in sorted(library.glob("*.py")))
    english = (library / "pydoc_data/topics.py").read_bytes()
    found = []
    for text in (python, english):
        every = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        end = int(len(every) * (1 - HELD_OUT))
        found.append(Text(every[:end], every[end:]))
    return found[0], found[1]


def batches(text: Tensor, size: tuple[int, int], seed: int, device: str) -> Iterator[Tensor]:
    """Random windows of the text, [batch, length + 1], without end."""
    batch, length = size
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length, (batch,), generator=generator)
        windows = [text[start : start + length + 1] for start in starts.tolist()]
        yield torch.stack(windows).long().to(device)


# ---- models --------------------------------------------------------------------------------------


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Tensor, size: tuple[int, int], device: str) -> float:
    model.eval()
    found = batches(text, size, 0, device)
    losses = [loss_of(model, next(found)).item() for _ in range(HELD_OUT_BATCHES)]
    model.train()
    return sum(losses) / len(losses)


def pretrained(text: Tensor, device: str, steps: int, dtype: torch.dtype) -> nn.Module:
    """A frozen model of `dtype` that has learnt the text."""
    import transformers

    (hidden, intermediate, heads, kv_heads, layers), size = SCALE[device]
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_key_value_heads=kv_heads, num_hidden_layers=layers, vocab_size=256,
        max_position_embeddings=size[1], pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), BASE_RATE)
    for _, batch in zip(range(steps), batches(text, size, 1, device), strict=False):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.to(dtype).requires_grad_(False)


class Learner:
    """One contender: its model, its optimizer, and the seconds that each of its steps took."""

    def __init__(self, model: nn.Module, scope: Callable[[], contextlib.AbstractContextManager]):
        self.model, self.scope, self.seconds = model, scope, []
        adapters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(adapters, RATE)

    def step(self, batch: Tensor) -> None:
        with self.scope():
            loss = loss_of(self.model, batch)
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()

    def timed_step(self, batch: Tensor) -> None:
        _wait(batch)
        start = time.perf_counter()
        self.step(batch)
        _wait(batch)
        self.seconds.append(time.perf_counter() - start)


def _wait(batch: Tensor) -> None:
    if batch.is_cuda:
        torch.cuda.synchronize()


def learners(
    base: nn.Module, rank: int, p: float, adapters: torch.dtype, backends: list[str]
) -> dict[str, Learner]:
    """The contenders by name, from the same start."""

    def model() -> nn.Module:
        return bench_model.with_peft(base, rank, p, adapters, deviation=0.0)

    found = {"peft": Learner(model(), contextlib.nullcontext)}
    found["applied"] = Learner(lk.apply(model()), contextlib.nullcontext)
    for name in backends:
        found[name] = Learner(lk.apply(model()), functools.partial(lk.use_backend, name))
    return found


# ---- the comparison ------------------------------------------------------------------------------


def wrong(row: dict, peft: dict, first_loss: float) -> str | None:
    """None, or why what a contender learnt is not what peft did."""
    ours, theirs = (first_loss - found["last_loss"] for found in (row, peft))
    if not theirs > 0:
        return f"peft learnt nothing: loss {first_loss:.4f} -> {peft['last_loss']:.4f}"
    if not abs(ours / theirs - 1) <= LEARNT:
        return f"wrong: it learnt {ours:.4f}, peft {theirs:.4f}; expected within {LEARNT:.0%}"
    return None


def train(found: dict[str, Learner], steps: int, seen: Iterator[Tensor]) -> Tensor:
    """All learners, in turns of which each begins as often; the last batch."""
    names = list(found)
    for i, batch in zip(range(steps), seen, strict=False):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            torch.manual_seed(i)
            found[name].timed_step(batch)
    return batch


def measure(args: argparse.Namespace, base: nn.Module, english: Text, case: dict) -> dict:
    """One table: every contender trained, judged and timed."""
    dtype = torch.float32 if case["adapters"] == "fp32" else shapes.DTYPES[case["dtype"]]
    found = learners(base, case["rank"], case["dropout"], dtype, args.backend)
    (*_, layers), size = SCALE[args.device]
    judge = functools.partial(held_out_loss, text=english.held_out, size=size, device=args.device)
    first_loss = judge(found["peft"].model)
    last = train(found, case["steps"], batches(english.seen, size, 2, args.device))
    rows: dict[str, dict] = {}
    for name, learner in found.items():
        taken = timing.Summary.of([1e3 * s for s in learner.seconds[WARM_UP_STEPS:]])
        with learner.scope():
            row = {"name": name, "last_loss": judge(learner.model)}
        peak = timing.peak_extra_bytes(functools.partial(learner.step, last), args.device)
        rows[name] = row | dataclasses.asdict(taken) | {
            "tokens_per_s": size[0] * size[1] / taken.median_ms * 1e3,
            "peak_bytes": peak, "peak_mib": peak / 2**20,
        }  # fmt: skip
        rows[name]["of_peft"] = taken.median_ms / rows["peft"]["median_ms"]
        why = wrong(row, rows["peft"], first_loss)
        fused, expected = lk.report(learner.model).fused, layers * len(bench_model.TARGETS)
        if name != "peft" and fused != expected:
            why = f"wrong: {fused} of {expected} layers are fused"
        if why is not None:
            rows[name]["error"] = why
    return case | {"first_loss": first_loss, "rows": list(rows.values())}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bench_finetune",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, cuda = parser.add_argument, torch.cuda.is_available()
    add(
        "--dtype", type=shapes.listed(shapes.one_of("dtype", shapes.DTYPES)),
        metavar="DTYPE[,DTYPE]", help="of the frozen weights; default bf16 on CUDA, fp32 on a CPU",
    )  # fmt: skip
    add(
        "--adapters", type=shapes.listed(shapes.one_of("dtype", ("same", "fp32"))),
        default=["fp32"], metavar="same|fp32", help="dtype of A and B; default fp32, as PEFT's",
    )  # fmt: skip
    add(
        "--backend", type=shapes.listed(shapes.one_of("backend", lk.backends())), default=[],
        metavar="NAME[,NAME]", help="of ours, train these too",
    )  # fmt: skip
    add("--rank", type=shapes.positive_int, default=16, help="default: %(default)s")
    add(
        "--dropout", type=shapes.listed(shapes.probability), default=[0.1], metavar="P[,P]",
        help="default: 0.1",
    )  # fmt: skip
    add("--steps", type=shapes.positive_int, help="default 200 on CUDA, 60 on a CPU")
    add("--base-steps", type=shapes.positive_int, help="default 300 on CUDA, 120 on a CPU")
    add("--threads", type=shapes.positive_int, help="of torch on the CPU")
    add(
        "--device", type=shapes.one_of("device", ("cpu", "cuda")),
        default="cuda" if cuda else "cpu", help="default: %(default)s",
    )  # fmt: skip
    add("--json", type=report.output_path, default=report.OUT / "finetune.json")
    args = parser.parse_args()
    if args.device == "cuda" and not cuda:
        parser.error("argument --device: got 'cuda', but torch sees no CUDA device; expected 'cpu'")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.steps = args.steps or STEPS[args.device]
    args.base_steps = args.base_steps or BASE_STEPS[args.device]
    args.dtype = args.dtype or (["bf16"] if args.device == "cuda" else ["fp32"])
    if args.steps < WARM_UP_STEPS + 2:
        parser.error(f"argument --steps: got {args.steps}, expected {WARM_UP_STEPS + 2} or more")
    return args


def main() -> int:
    args, console = parse(), Console()
    machine, tables = report.environment(args.device), []
    if missing := [name for name in ("peft", "transformers") if report.version(name) is None]:
        console.print(f"not installed: pip install {' '.join(missing)}", style="bold red")
        return 1
    python, english = texts()
    settings = {
        "scale": SCALE[args.device], "base_steps": args.base_steps, "base_rate": BASE_RATE,
        "rate": RATE, "scaling": contenders.SCALING, "held_out_batches": HELD_OUT_BATCHES,
        "transformers": report.version("transformers"),
    }  # fmt: skip
    for dtype in args.dtype:
        base = pretrained(python.seen, args.device, args.base_steps, shapes.DTYPES[dtype])
        millions = sum(p.numel() for p in base.parameters()) * 1e-6
        about = {"model": f"Llama of bytes, {millions:.1f} M", "steps": args.steps, "dtype": dtype}
        for adapters in args.adapters:
            for p in args.dropout:
                case = about | {"adapters": adapters, "rank": args.rank, "dropout": p}
                tables.append(measure(args, base, english, case))
                title = f"{TITLE.format(**case)}, held out {tables[-1]['first_loss']:.4f} before"
                console.print(report.table(title, tables[-1]["rows"], COLUMNS))
                report.write(args.json, "finetune", machine, settings, {"groups": tables})
    failures = report.failures(tables, lambda table: f"{table['dtype']} p={table['dropout']:g}")
    content = {"groups": tables, "failures": failures}
    return report.finish(console, args.json, "finetune", machine, settings, content)


if __name__ == "__main__":
    sys.exit(main())
