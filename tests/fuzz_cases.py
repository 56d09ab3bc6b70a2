"""What fuzz.py has found: each call, and what was wrong with it. CI makes them again."""

from __future__ import annotations

from fuzz_arguments import SEED, Call
from fuzz_values import Case

_X, _W, _A, _B = (f"torch.randn({size})" for size in ("5, 8", "6, 8", "3, 8", "6, 3"))
_NOTHING = "torch.empty(0, 0)"


def _call(*args: str, **kwargs: str) -> Call:
    return Call("lk.fused_lora_linear", args, tuple(kwargs.items()))


ARGUMENTS = [
    # Read memory that its parameter had given back, as FSDP does outside of forward: SIGSEGV.
    _call(_X, "freed(6, 8)", _A, _B),
    _call("freed(5, 8)", _W, _A, _B),
    _call(_X, _W, "freed(3, 8)", _B),
    _call(_X, _W, _A, _B, "freed(6)"),
    _call(_X, "cut(6, 8)", _A, _B),
    Call("ops.forward_group", (_X, f"[{_W}, freed(6, 8)]", f"[{_A}, {_A}]", f"[{_B}, {_B}]",
         "[None, None]", f"[{SEED}, {SEED}]", "100", "[1.0, 1.5]", "[1.0, 1.5]")),
    # Took any number for a probability: OverflowError, and from 1 on a mask of no meaning.
    Call("ops.lora_linear", (_X, _W, _A, _B, "None", SEED, "1.5", "float('inf')", "'composed'")),
    # Went on until torch had no integer for a size: AttributeError.
    _call("torch.nested.nested_tensor([torch.ones(5, 8)], layout=torch.jagged)", _W, _A, _B),
    # Walked 2^40 rows of no columns, for hours.
    Call("lk.dropout_mask", ("[1, 2]", "(1 << 40, 0)", "0.5")),
    Call("ops.down_proj", ("torch.empty(1 << 40, 0)", _NOTHING, "None", "0", "1.0")),
    Call("ops.weight_grad", (_NOTHING, "torch.empty(0, 1 << 40)", "None", "0", "1.0", "False",
         "False")),
    _call("torch.empty(1 << 40, 0)", *[_NOTHING] * 3, backend="'cpu'"),
    # Was held to a mask that no specification gives: its rows begin at 2^63 - 1.
    Call("lk.dropout_mask", ("torch.full((4,), (1 << 63) - 1)", "(5, 8)", "0.5", "None")),
    # Ended in torch's AssertionError, from within the operator.
    _call(_X, _W, _A, _B, "fake(6)", dropout_p="0.5", seed=SEED),
    Call("lk.fused_lora_linear_group", ("fake(5, 8)", f"[{_W}]", f"[{_A}]", f"[{_B}]"),
         (("scalings", "1.0"),)),
]  # fmt: skip

VALUES = [
    # Failed in the fuzz itself, which asked more of plain PyTorch than it promises: a view for one
    # row, a bias's gradient that is dy, and a dx of a group that autograd adds up in 16 bits.
    Case(backend="reference", lead=(), k=1, sizes=((1, 1),), p=0.99999),
    Case(lead=(), k=1, sizes=((2, 1),), dtype="f64", needs=("bias",)),
    Case(
        "group", "reference", (7,), 1, ((1, 1), (1, 1), (1, 1)), "bf16", needs=("x",), scaling=1.0
    ),
    # y of a group had its bias without the sign that torch keeps beside the memory.
    Case("group", "cpu", layouts=("plain",) * 4 + ("negated", "plain")),
]
