"""What a training step sends, on paper: bytes a rank sends for Llama-3.1-8B's linear layers.

A model, not a measurement: ring algorithms, every linear layer of every block adapted, nothing for
embeddings, norms and the head. Of n bytes on P ranks each rank sends 2 (P-1)/P n to all-reduce
them, and (P-1)/P n to all-gather or to reduce-scatter them. Weights and activations have 16 bits,
adapters and their gradients 32.

    python -m bench.communication    # the table of docs/scaling.md
"""

from __future__ import annotations

LAYERS, WIDTH, KEYS, HIDDEN = 32, 4096, 1024, 14336
RANK, ROWS, RANKS = 16, 8192, 8
# N, K: q, k, v, gate, up are divided by columns under tensor parallelism, o and down by rows.
COLUMN = ((WIDTH, WIDTH), (KEYS, WIDTH), (KEYS, WIDTH), (HIDDEN, WIDTH), (HIDDEN, WIDTH))
ROW = ((WIDTH, WIDTH), (WIDTH, HIDDEN))
WEIGHTS = 2 * LAYERS * sum(n * k for n, k in COLUMN + ROW)
ADAPTERS = 4 * LAYERS * sum(RANK * (n + k) for n, k in COLUMN + ROW)
ACTIVATION = 2 * ROWS * WIDTH


def gather(size: int) -> float:
    """Of an all-gather, and of a reduce-scatter."""
    return (RANKS - 1) / RANKS * size


def all_reduce(size: int) -> float:
    return 2 * gather(size)


def table() -> list[tuple[str, str, float]]:
    """(what, how, bytes a rank sends a step)."""
    partial = 4 * LAYERS * RANK * (sum(k for _, k in COLUMN) + sum(n for n, _ in ROW))
    y_and_dx = 2 + 2  # of the attention and of the MLP
    return [
        ("DDP", "all-reduce of the adapters' gradients", all_reduce(ADAPTERS)),
        ("DDP, everything trains", "all-reduce of 16-bit gradients", all_reduce(WEIGHTS)),
        ("FSDP2", "all-gather of frozen weights, forward and backward", 2 * gather(WEIGHTS)),
        (
            "FSDP2",
            "the adapters: two all-gathers, one reduce-scatter of gradients",
            3 * gather(ADAPTERS),
        ),
        ("FSDP2, everything trains", "the same three of the weights", 3 * gather(WEIGHTS)),
        (
            "tensor parallel",
            "all-reduce of y of o and down, of dx of their inputs",
            y_and_dx * LAYERS * all_reduce(ACTIVATION),
        ),
        (
            "tensor parallel",
            "the same, with an all-reduce of dx for each of q, k, v, gate, up",
            (len(ROW) + len(COLUMN)) * LAYERS * all_reduce(ACTIVATION),
        ),
        ("tensor parallel", "all-reduce of dA by columns, of dB by rows", all_reduce(partial)),
    ]


def in_words(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    for what, how, size in table():
        print(f"| {what} | {how} | {in_words(size)} |")
