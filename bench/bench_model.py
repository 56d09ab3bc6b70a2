"""`python -m bench.bench_model`: a training step of one decoder layer with PEFT's LoRA.

The layer is transformers' LlamaDecoderLayer with random frozen weights, its seven linear layers
under PEFT's LoRA in training mode; a step is forward and backward down to the layer's input, as in
the middle of a model, without the optimizer.

  frozen    no adapters: gradients of the layer's input alone
  peft      PEFT's own layers
  applied   the same after `lora_kernels.apply`, with the backend that each call chooses
  NAME      the same, with the backend NAME

All share their weights and take turns. `of peft` is time over that of peft; `saved` is what
autograd keeps between forward and backward besides parameters and input, `peak` the most that a
step holds beyond them. Before it is timed, what is ours is compared with peft without dropout:
output and every gradient; a wrong one, or a layer that is not fused, is an error and not timed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

import lora_kernels as lk

from . import bench_memory, contenders, report, shapes, timing

MODELS = {  # hidden, intermediate, heads, heads of k and v
    "llama-3.1-8b": (4096, 14336, 32, 8),
    "smollm2-135m": (576, 1536, 9, 3),
}
LENGTH = 2048  # tokens of a sequence, at most
SECONDS = {"cpu": 2.0, "cuda": 3.0}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TITLE = "{model}  {tokens} tokens {dtype}, adapters {adapters}, r={rank} dropout {dropout:g}"
COLUMNS = {
    "median_ms": ("time ms", report.digits),
    "iqr_ms": ("IQR ms", report.digits),
    "over_frozen": ("over frozen", report.times),
    "of_peft": ("of peft", "{:.3f}x".format),
    "tokens_per_s": ("tokens/s", "{:,.0f}".format),
    "saved_mib": ("saved MiB", report.digits),
    "peak_mib": ("peak MiB", report.digits),
}


class Layer(NamedTuple):
    """One contender: a decoder layer, and what its calls run in."""

    module: nn.Module  # one decoder layer as a model of embeddings
    x: Tensor  # [batch, length, hidden], requires grad
    dy: Tensor
    scope: Callable[[], contextlib.AbstractContextManager]

    def forward(self) -> Tensor:
        with self.scope():
            return self.module(inputs_embeds=self.x, use_cache=False).last_hidden_state

    def step(self) -> tuple[Tensor, ...]:
        """dx and the gradients of the adapters."""
        y = self.forward()
        adapters = [p for p in self.module.parameters() if p.requires_grad]
        with self.scope():
            return torch.autograd.grad(y, [self.x, *adapters], self.dy)


def make_base(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """One layer of the model, frozen, with the vocabulary left out."""
    import transformers

    hidden, intermediate, heads, kv_heads = MODELS[name]
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
        num_key_value_heads=kv_heads, num_hidden_layers=1, vocab_size=8, rope_theta=5e5,
        max_position_embeddings=LENGTH, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.LlamaModel(config)
    return model.to(dtype).requires_grad_(False).train()


def with_peft(
    base: nn.Module, rank: int, p: float, dtype: torch.dtype, deviation: float = 0.02
) -> nn.Module:
    """PEFT's layers on the weights of `base`, with A and B in `dtype`.

    `deviation` is that of B's elements: the zeros with which training starts would hide A.
    """
    from peft import LoraConfig, inject_adapter_in_model

    shared = {id(t): t for t in (*base.parameters(), *base.buffers())}
    config = LoraConfig(
        r=rank, lora_alpha=contenders.SCALING * rank, lora_dropout=p, target_modules=TARGETS
    )
    torch.manual_seed(1)
    model = inject_adapter_in_model(config, copy.deepcopy(base, shared))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=deviation)
    return model.train()


def layers_of(
    base: nn.Module, rank: int, p: float, adapters: torch.dtype, backends: list[str], x: Tensor
) -> dict[str, Layer]:
    """The contenders by name, on one input."""
    dy = torch.randn(x.shape, generator=_generator(x), device=x.device).to(x.dtype)
    peft = with_peft(base, rank, p, adapters)
    applied = lk.apply(with_peft(base, rank, p, adapters))
    plain = contextlib.nullcontext
    found = {"frozen": Layer(base, x, dy, plain), "peft": Layer(peft, x, dy, plain)}
    found["applied"] = Layer(applied, x, dy, plain)
    for name in backends:
        found[name] = Layer(applied, x, dy, functools.partial(lk.use_backend, name))
    return found


def _generator(x: Tensor) -> torch.Generator:
    return torch.Generator(x.device).manual_seed(2)


def wrong(layer: Layer, peft: Layer) -> str | None:
    """None, or in what a layer of ours, without dropout, differs from PEFT's."""
    fused = lk.report(layer.module)
    if fused.fused != len(TARGETS):
        return f"wrong: {fused.fused} of {len(TARGETS)} layers are fused"
    found, exact = ((one.forward().detach(), *one.step()) for one in (layer, peft))
    error, bound = contenders.relative_error(found, exact), contenders.tolerance(layer.x.dtype)
    if not error <= bound:
        return f"wrong: relative error {error:.1e} beside peft, expected <= {bound:.1e}"
    return None


def measure(args: argparse.Namespace, case: dict, base: nn.Module, timer) -> list[dict]:
    """A row for each contender."""
    dtype = shapes.DTYPES[case["dtype"]]
    adapters = torch.float32 if case["adapters"] == "fp32" else dtype
    length = min(case["tokens"], LENGTH)
    size = (case["tokens"] // length, length, base.config.hidden_size)
    x = torch.randn(size, generator=_generator(base.norm.weight), device=args.device).to(dtype)
    x.requires_grad_()

    def layers(p: float) -> dict[str, Layer]:
        return layers_of(base, case["rank"], p, adapters, args.backend, x)

    exact, rows = layers(0.0), {}
    for name in [n for n in exact if n not in ("frozen", "peft")]:
        if (why := wrong(exact[name], exact["peft"])) is not None:
            rows[name] = {"name": name, "error": why}
    timed = {n: layer for n, layer in layers(case["dropout"]).items() if n not in rows}
    for layer in timed.values():
        for _ in range(timing.WARM_UP_CALLS[args.device]):
            layer.step()
    calls = {name: layer.step for name, layer in timed.items()}
    for name, found in timing.interleave(calls, timer, args.rounds, args.seconds).items():
        layer = timed[name]
        saved = bench_memory.saved_bytes(layer.forward, (x, *layer.module.parameters()))
        peak = timing.peak_extra_bytes(layer.step, args.device)
        rows[name] = {
            "name": name, **dataclasses.asdict(found),
            "tokens_per_s": case["tokens"] / found.median_ms * 1e3,
            "saved_bytes": saved, "saved_mib": saved / 2**20,
            "peak_bytes": peak, "peak_mib": peak / 2**20,
        }  # fmt: skip
    for row in rows.values():
        for key, other in (("over_frozen", "frozen"), ("of_peft", "peft")):
            if "median_ms" in row:
                row[key] = row["median_ms"] / rows[other]["median_ms"]
    return list(rows.values())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bench_model",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model", type=shapes.one_of("model", MODELS), metavar="NAME",
        help=f"one of {', '.join(MODELS)}; default llama-3.1-8b on CUDA, smollm2-135m on a CPU",
    )  # fmt: skip
    add(
        "--backend", type=shapes.listed(shapes.one_of("backend", lk.backends())), default=[],
        metavar="NAME[,NAME]", help="of ours, time these too",
    )  # fmt: skip
    add(
        "--adapters", type=shapes.listed(shapes.one_of("dtype", ("same", "fp32"))),
        default=["same"], metavar="same|fp32", help="dtype of A and B; default: that of the layer",
    )  # fmt: skip
    add("--json", type=report.output_path, default=report.OUT / "model.json")
    args = shapes.parse(parser, SECONDS)
    if args.preset or args.shape:
        parser.error("--preset and --shape name single linear layers; take --model")
    return args


def main() -> int:
    args, console = parse(), Console()
    machine, timer, tables = report.environment(args.device), timing.make_timer(args.device), []
    if machine["peft"] is None:
        console.print("peft is not installed: pip install peft", style="bold red")
        return 1
    cuda = args.device == "cuda"
    model = args.model or ("llama-3.1-8b" if cuda else "smollm2-135m")
    settings = {
        "rounds": args.rounds, "seconds_per_table": args.seconds, "scaling": contenders.SCALING,
        "transformers": report.version("transformers"),
    }  # fmt: skip
    for dtype in args.dtype or (["bf16"] if cuda else ["fp32"]):
        base = make_base(model, shapes.DTYPES[dtype], args.device)
        cases = [
            {"model": model, "tokens": tokens, "dtype": dtype, "adapters": adapters, "rank": rank,
             "dropout": p}
            for tokens in args.tokens for adapters in args.adapters for rank in args.rank
            for p in args.dropout
        ]  # fmt: skip
        for case in cases:
            rows = measure(args, case, base, timer)
            console.print(report.table(TITLE.format(**case), rows, COLUMNS))
            tables.append({**case, "rows": rows})
            report.write(args.json, "model", machine, settings, {"groups": tables})
    failures = report.failures(
        tables, lambda table: f"{table['tokens']} tokens p={table['dropout']:g}"
    )
    return report.finish(
        console, args.json, "model", machine, settings, {"groups": tables, "failures": failures}
    )


if __name__ == "__main__":
    sys.exit(main())
