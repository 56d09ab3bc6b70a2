"""Random arguments, of any type, layout and size, for every public callable and raw operator.

A Call is Python source, so its repr is a line to paste. No call may crash or hang the process, only
REFUSALS may come out, a refusal of this package names its call first, and what returns is right.
"""

from __future__ import annotations

import contextlib
import inspect
import resource
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import torch
from problems import Problem
from tolerance import assert_c1
from torch import Tensor

import lora_kernels as lk
from lora_kernels import dropout
from lora_kernels.schemas import SCHEMAS

REFUSALS = (TypeError, ValueError, RuntimeError, NotImplementedError)
# An operator trusts the checks above it. Where it is called past them, Python and torch say what
# they will of a None or of a tensor without dimensions; but nothing crashes.
OF_OPERATORS = (*REFUSALS, AttributeError, IndexError, AssertionError)
SECONDS = 60  # of the processor for one call: the first fake tensor imports half of torch
PATIENCE = 10 * SECONDS  # by the clock, for a call that waits; a busy machine is no failure
MEMORY = 12 << 30  # bytes of address space: what asks for more is refused, not granted and killed
PACKAGE = str(Path(lk.__file__).parent)


@dataclass(frozen=True)
class Call:
    """`function`(*args, **kwargs), all of them source that `evaluate` understands."""

    function: str
    args: tuple[str, ...]
    kwargs: tuple[tuple[str, str], ...] = ()


# ---- what arguments are made of ------------------------------------------------------------------


class Sub(torch.Tensor):
    """A subclass of Tensor that changes nothing."""


def freed(*size: int) -> Tensor:
    """As FSDP leaves a parameter that it has given back: sizes, and no memory."""
    t = torch.ones(size)
    t.untyped_storage().resize_(0)
    return t


def cut(*size: int) -> Tensor:
    """Half of its memory is left."""
    t = torch.ones(size)
    t.untyped_storage().resize_(t.nbytes // 2)
    return t


def fake(*size: int) -> Tensor:
    with torch._subclasses.FakeTensorMode():
        return torch.ones(size)


def inference(*size: int) -> Tensor:
    with torch.inference_mode():
        return torch.ones(size)


def overlapping(*size: int) -> Tensor:
    """Every dimension takes the same step of one element."""
    return torch.randn(sum(size) + 1).as_strided(size, (1,) * len(size))


NAMES = {"torch": torch, "lk": lk, "np": np, "Sub": Sub, "freed": freed, "cut": cut,
         "fake": fake, "inference": inference, "overlapping": overlapping,
         "ops": torch.ops.lora_kernels}  # fmt: skip
# x [5, 8], weight [6, 8], r = 3: the shapes of the good call that is made bad.
SIZES = dict(
    x="5, 8", weight="6, 8", lora_a="3, 8", lora_b="6, 3", bias="6", dy="5, 6", h="5, 3",
    down="3, 8", up="6, 3",
)  # fmt: skip
MANY = dict(weights="weight", lora_as="lora_a", lora_bs="lora_b", biases="bias", dys="dy", hs="h")
SEED = "torch.tensor([1, 2])"
GOOD = {
    "seed": SEED, "scaling": "1.5", "scalings": "1.5", "dropout_p": "0.5", "backend": "None",
    "seeds": f"[{SEED}, {SEED}]", "p": "0.5", "shape": "(5, 8)", "device": "'cpu'",
    "in_features": "8", "out_features": "6", "r": "3", "lora_alpha": "2.0", "lora_dropout": "0.5",
    "use_rslora": "False", "adapter_dtype": "torch.float32", "dtype": "torch.float32",
    "name": "'composed'", "threshold": "100", "rows": "5", "cols": "8", "form": "'passes'",
    "tile_n": "0", "group": "0",
    **{name: f"torch.randn({size})" for name, size in SIZES.items()},
    **{many: f"[torch.randn({SIZES[one]}), torch.randn({SIZES[one]})]"
       for many, one in MANY.items()},
}  # fmt: skip
OF_SIZE = (  # tensors of the right size, or of one that is near
    "torch.randn({})", "torch.ones({}, dtype=torch.int32)", "torch.ones({}).bfloat16()",
    "torch.ones({}).half()", "torch.ones({}).double()", "torch.ones({}, dtype=torch.complex64)",
    "torch.ones({}).to(torch.float8_e4m3fn)", "torch.ones({}, dtype=torch.bool)",
    "torch.ones({}, device='meta')", "torch.ones({}).to_sparse()", "torch.ones({}).to_mkldnn()",
    "torch.ones({}).to_sparse_csr()", "torch.nested.nested_tensor([torch.ones({})])",
    "torch.nested.nested_tensor([torch.ones({})], layout=torch.jagged)",
    "torch.quantize_per_tensor(torch.ones({}), 0.1, 0, torch.qint8)", "Sub(torch.ones({}))",
    "torch.nn.Parameter(torch.ones({}))", "freed({})", "cut({})", "fake({})", "inference({})",
    "torch._neg_view(torch.ones({}))", "torch._efficientzerotensor(({},))",
    "torch.ones({}, dtype=torch.complex64).conj().real", "torch.full(({},), float('nan'))",
    "torch.ones({})[..., None]", "torch.ones({})[None]", "torch.ones({}).t()",
    "torch.ones({}).mT", "torch.ones({}).flatten()", "torch.ones({})[:0]",
    "torch.ones({})[..., :0]",
    "torch.ones(1).expand({})", "overlapping({})",
)  # fmt: skip
TENSORS = (
    "torch.tensor(1.0)", "torch.empty(0)", "torch.empty(0, 8)", "torch.empty(5, 0)",
    "torch.ones([1] * 63 + [8])", "torch.ones([1] * 70 + [8])", "torch.zeros(2).long()",
    "torch.zeros(4).long()", "torch.zeros(4).long()[::2]", "torch.full((4,), -1)",
    "torch.full((4,), (1 << 63) - 1)", "torch.zeros(2, 2).long()",
)  # fmt: skip
HUGE = (  # for a tensor's place alone: torch prints what it finds in another's, for hours
    "torch.ones(1).expand(1 << 40, 8)", "torch.ones(1).expand(5, 1 << 40)",
    "torch.ones(1).expand(1 << 59, 8)", "torch.ones(1).expand(1 << 31, 1 << 30)",
    "torch.empty(1 << 40, 0)", "torch.empty(0, 1 << 40)", "torch.empty(0, 1 << 62)",
)  # fmt: skip
OBJECTS = (
    "None", "0", "1", "-1", "3", "True", "2.5", "0.0", "-0.0", "1.0", "1e-40", "1e300", "1 << 40",
    "1 << 62", "1 << 64", "10**400", "float('nan')", "float('inf')", "-float('inf')", "1j", "''",
    "'x'", "'cpu'", "'reference'", "'triton'", "'automatic forward'", "b'x'", "[]", "()",
    "{}", "[[1.0]]", "[None, None]", "[1.5, 2.5]", "(5, -8)", "(1 << 40, 0)", "(1 << 62, 4)",
    "(2.5, 1)", "[1, 2]", "[1, 2, 3]", "[1 << 70, 0]", "['a', 'b']", "range(2)", "iter([])",
    "object()", "torch", "torch.float16", "torch.int8", "torch.complex64", "torch.float64",
    "'meta'",
    "torch.device('meta')", "np.float32(0.5)", "np.int64(3)", "np.ones((6, 8))",
    "np.float64('nan')",
    "torch.nn.Linear(8, 6)", "[torch.ones(6, 8)]", "[torch.ones(6, 8), None]",
    "[torch.ones(6, 8)] * 3", "torch.ones(2)", "'two_launches'", "'sm80'",
)  # fmt: skip
INTEGERS = ("0", "100", "5", "8", "6", "3", "1", "-1", "16384", "16385", "1 << 40", "1 << 62",
            "-(1 << 63)")  # fmt: skip
FLOATS = ("1.5", "0.5", "2.0", "0.0", "-1.0", "1e-40", "1e300", "float('inf')", "float('nan')",
          "2.0**112")  # fmt: skip
BOOLEANS = ("True", "False")
WORDS = ("'composed'", "'cpu'", "'reference'", "'triton'", "'cuda'", "''", "'x'",
         "'automatic forward'")  # fmt: skip
PUBLIC = (
    "lk.fused_lora_linear", "lk.fused_lora_linear", "lk.fused_lora_linear_group", "lk.explain",
    "lk.LoRALinear", "lk.dropout_mask", "lk.keep_probability", "lk.use_backend",
)  # fmt: skip
# Those that a CPU serves; others refuse before they look at an argument.
RAW = tuple(
    f"ops.{name}"
    for name in (schema.partition("(")[0] for schema in SCHEMAS)
    if not name.endswith(("_plan", "_as", "_triton"))
)


def parameters(function: str) -> dict[str, tuple[bool, str]]:
    """By name: whether it is passed by keyword alone, and the source of a good value."""
    if function.startswith("ops."):
        schema = getattr(torch.ops.lora_kernels, function[4:]).default._schema
        return {a.name: (False, good_of(a.name, str(a.type), function)) for a in schema.arguments}
    found = inspect.signature(eval(function, NAMES)).parameters
    return {
        name: (p.kind is p.KEYWORD_ONLY, GOOD[name]) for name, p in found.items() if name in GOOD
    }


def good_of(name: str, kind: str, function: str) -> str:
    if kind == "bool":
        return "True" if name.startswith("need") else "False"
    if kind.startswith("List[bool]"):
        return "[True, True]" if name.startswith("need") else "[False, False]"
    if kind.startswith("List[float]"):
        return "[1.0, 1.5]"
    if name == "backend":
        return "'composed'"
    if name == "form" and "forward" in function:
        return "'two_launches'"
    return GOOD.get(name, "1.5")


@st.composite
def cases(draw, backends: tuple[str, ...]) -> Call:
    """A good call with some of its arguments made bad."""
    function = draw(st.sampled_from(PUBLIC) | st.sampled_from(RAW))
    known = parameters(function)
    given = {name: source for name, (_, source) in known.items()}
    for name in draw(st.lists(st.sampled_from(sorted(known)), max_size=3)) if known else ():
        changed = draw(argument(name, given[name]))
        given[name] = changed
        if is_lost(changed):  # alone: torch's own conversions crash on it
            given = {n: source for n, (_, source) in known.items()} | {name: changed}
            break
    if "backend" in given and given["backend"] == "None":
        given["backend"] = repr(draw(st.sampled_from((None, *backends))))
    args = tuple(source for name, source in given.items() if not known[name][0])
    return Call(function, args, tuple((n, s) for n, s in given.items() if known[n][0]))


@st.composite
def argument(draw, name: str, good: str) -> str:
    """Most often of the good one's kind: what is of another, torch refuses for an operator."""
    one = MANY.get(name, name)
    if one not in SIZES and name not in ("seed", "seeds", "device") and draw(st.integers(0, 2)):
        for kind in (INTEGERS, FLOATS, BOOLEANS, WORDS):
            if good in kind:
                return draw(st.sampled_from(kind))
    kinds = [st.sampled_from(OBJECTS), st.sampled_from(TENSORS)]
    if one in SIZES:
        near = st.sampled_from((SIZES[one], SIZES[one], *SIZES.values()))
        kinds += [st.builds(str.format, st.sampled_from(OF_SIZE), near)] * 2
        kinds.append(st.sampled_from(HUGE))
    source = draw(st.one_of(kinds))
    in_list = name in MANY and draw(st.booleans())
    if in_list or (name in MANY and is_lost(source)):  # torch prints what is no list: a crash
        return f"[{GOOD[one]}, {source}]"
    return source


def is_lost(source: str) -> bool:
    """Whether it makes a tensor without all of its memory, on which torch itself may crash."""
    return "freed(" in source or "cut(" in source


# ---- the judgement -------------------------------------------------------------------------------


def check(call: Call) -> None:
    """Makes the call; a signal, as of a crash or of SECONDS, is for the process's parent to see."""
    with limits():
        try:
            args, kwargs = evaluate(call)
        except Exception:  # torch refuses to make the argument
            return
        if left_to_torch(call, args, kwargs):
            return
        torch.manual_seed(0)
        try:
            result = eval(call.function, NAMES)(*args, **kwargs)
        except MemoryError:
            return  # as honest as torch's RuntimeError, for what no machine has
        except OF_OPERATORS as error:
            if not call.function.startswith("ops."):
                assert isinstance(error, REFUSALS), f"no refusal: {error!r}"
                assert_clear(call, error)
            return
        finally:
            lk.use_backend(None)
        if call.function.startswith("lk."):
            assert_right(call, args, kwargs, result)


def left_to_torch(call: Call, args: list, kwargs: dict) -> bool:
    """Freed memory that torch's own operators would read, and products that take them hours."""
    given = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, list) else [a])]
    sources = (*call.args, *dict(call.kwargs).values())
    if any(map(is_lost, sources)) and {"'composed'", "'reference'"} & {*sources}:
        return True
    return sum(type(t) is Tensor and t.numel() > 2**32 for t in given) > 1


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """SIGPROF or SIGALRM, which end the process, for a call that does not; no more than MEMORY."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def evaluate(call: Call) -> tuple[list, dict]:
    args = [eval(source, dict(NAMES)) for source in call.args]
    return args, {name: eval(source, dict(NAMES)) for name, source in call.kwargs}


def assert_clear(call: Call, error: Exception) -> None:
    """What this package raises itself, and not torch below it, begins with the call's name."""
    *_, last = traceback.extract_tb(error.__traceback__)
    raised_here = last.filename.startswith(PACKAGE) and (last.line or "").startswith("raise ")
    if not raised_here:
        return
    name = call.function.rpartition(".")[2]
    said = ("fused_lora_linear: ", "LoRALinear") if name != "dropout_mask" else ()
    assert str(error).startswith((f"{name}", *said)), f"unclear: {error!r}"


def assert_right(call: Call, args: list, kwargs: dict, result) -> None:
    """y against float64, or its shape alone where float64 has no say."""
    bound = inspect.signature(eval(call.function, NAMES)).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if call.function == "lk.fused_lora_linear_group":
        assert len(result) == len(list(given["weights"]))
    if call.function == "lk.dropout_mask":
        seed = torch.as_tensor(given["seed"])
        shape = tuple(given["shape"])
        rows, cols, t = torch.Size(shape[:-1]).numel(), shape[-1], round(given["p"] * 16384)
        assert tuple(result.shape) == shape
        if result.device.type == "cpu" and result.numel() > 0 and specified(seed, rows, cols):
            exact = dropout.reference_mask(seed, rows, cols, t)
            assert torch.equal(result.reshape(exact.shape), exact)
    if call.function == "lk.fused_lora_linear":
        assert_linear(given, result)


def specified(seed: Tensor, rows: int, cols: int) -> bool:
    """Whether every row and column has a mask by the specification in `dropout`."""
    row0, col0 = seed[2:].tolist() if len(seed) == 4 else (0, 0)
    return 0 <= row0 <= 2**33 - rows and 0 <= col0 <= 2**34 - cols


def assert_linear(given: dict, y: Tensor) -> None:
    x, weight, p = given["x"], given["weight"], float(given["dropout_p"])
    assert y.shape == (*x.shape[:-1], weight.shape[0]) and y.dtype == x.dtype, "shape or dtype"
    tensors = [given[name] for name in ("x", "weight", "lora_a", "lora_b", "bias")]
    if x.dim() > 64:  # torch's own limit for most of what judges
        return
    if any(type(t) is not Tensor or t.device.type != "cpu" for t in tensors if t is not None):
        return
    if not all(t.isfinite().all() for t in tensors if t is not None):
        return
    seed = given["seed"]
    if seed is None:
        torch.manual_seed(0)
        seed = dropout.draw_seed(x.device)
    if not specified(seed, x.shape[:-1].numel(), x.shape[-1]):
        return
    dy = torch.zeros(y.shape, dtype=y.dtype)
    problem = Problem(*tensors, dy, float(given["scaling"]), p, seed)
    assert_c1(problem, {"y": y.detach()}, eager_like=True)
