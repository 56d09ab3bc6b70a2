"""The backward pass on Hopper, in the emulator and on a device."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from devices import moved
from emulator.suite import SCHEDULES
from test_forward import DTYPES, SCALE, SEEDS, SHAPES, THRESHOLD, VIEWS, bits
from test_kernels import UNIT, close

from lora_kernels import dropout

UP = 0.75  # of the up projection: scale of dA, dB and of the LoRA term of dx
FORMS = ("passes", "one_grid")
NAMES = ("dx", "da", "db", "dbias")
# and what only backward has: chunks of 512, 256 and 128 rows with a tail, more than one block of
# ranks, splits of both passes
MORE = {
    "two_chunks": (600, 136, 200, 16),
    "two_chunks_rank_100": (300, 136, 72, 100),
    "two_chunks_rank_256": (140, 136, 72, 256),
    "two_blocks_of_ranks": (140, 72, 72, 300),
    "rank_past_a_block_odd": (140, 72, 72, 257),
    "many_splits": (70, 1100, 1300, 8),
}


class Step:
    """Operands of one backward call, in the emulator and in float64."""

    def __init__(self, shape, dtype=torch.bfloat16, seed=None, wide=False):
        m, n, k, r = shape
        g = torch.Generator().manual_seed(m + 3 * n + 7 * k + r)

        def normal(*size, scale=1.0):
            return (torch.randn(*size, generator=g) * scale).to(dtype)

        self.shape, self.dtype, self.seed, self.wide = shape, dtype, seed, wide
        self.db_scale = UP

        self.dy, self.x = normal(m, n), normal(m, k)
        self.weight = normal(n, k, scale=max(n, 1) ** -0.5)
        self.a, self.b = normal(r, k), normal(n, r, scale=max(n, 1) ** -0.5)
        self.h = normal(m, r)

    def options(self, **options) -> dict:
        found = {"bf16": self.dtype == torch.bfloat16, "scale": (SCALE, UP)}
        if self.seed:
            found |= {"seed": self.seed, "threshold": THRESHOLD}
        return found | options

    def operands(self) -> list:
        return [bits(t) for t in (self.dy, self.x, self.weight, self.a, self.b, self.h)]

    def results(self, wanted=NAMES) -> dict[str, torch.Tensor]:
        m, n, k, r = self.shape
        grads = torch.float32 if self.wide else self.dtype
        sizes = {"dx": (m, k), "da": (r, k), "db": (n, r), "dbias": (n,)}
        dtypes = {"dx": self.dtype, "da": grads, "db": grads, "dbias": self.dtype}
        return {name: torch.empty(sizes[name], dtype=dtypes[name]) for name in wanted}

    @staticmethod
    def given(results: dict) -> dict:
        return {n: t.numpy() if t.dtype == torch.float32 else bits(t) for n, t in results.items()}

    def without_x(self) -> None:
        """As autograd hands x in where A is not trained: any read of it is out of bounds or NaN."""
        self.x = torch.full((), torch.nan, dtype=self.dtype).expand(self.x.shape)

    def run(self, emulated, copies: int = 1, wanted=NAMES, **options):
        """(results of each copy, what the emulator and the plan say)."""
        results = [self.results(wanted) for _ in range(copies)]
        given = [self.given(r) for r in results]
        return results, emulated.backward(self.operands(), given, self.options(**options))

    def exact(self, device) -> dict[str, tuple]:
        """Of each gradient in float64: value, sum of absolute values, what the rounding of dh on
        its way may do to it, length of the sum."""
        m, n, k, r = self.shape
        dy, x, w, a, b, h = (
            t.to(device).double() for t in (self.dy, self.x, self.weight, self.a, self.b, self.h)
        )
        mask = torch.ones(m, k, dtype=torch.bool, device=device)
        if self.seed:
            seed = torch.tensor(self.seed, device=device)
            mask = dropout.reference_mask(seed, m, k, THRESHOLD)
        dropped = torch.where(mask, x, 0)
        dh, dh_total = SCALE * dy @ b, SCALE * dy.abs() @ b.abs()
        rounded = UNIT[self.dtype] * dh.abs() + n * 2.0**-22 * dh_total  # how far dh may be off
        lora = torch.where(mask, dh @ a, 0)
        lora_total = torch.where(mask, dh_total @ a.abs(), 0)
        lora_off = torch.where(mask, rounded @ a.abs(), 0)
        return {
            "dx": (dy @ w + UP * lora, dy.abs() @ w.abs() + UP * lora_total, UP * lora_off, n + r),
            "da": (
                UP * dh.T @ dropped, UP * dh_total.T @ dropped.abs(),
                UP * rounded.T @ dropped.abs(), m,
            ),
            "db": (self.db_scale * dy.T @ h, self.db_scale * dy.abs().T @ h.abs(), 0, m),
            "dbias": (dy.sum(0), dy.abs().sum(0), 0, m),
        }  # fmt: skip

    def check(self, results: dict[str, torch.Tensor]) -> None:
        exact = self.exact(next(iter(results.values())).device)
        for name, got in results.items():
            assert_near(got, *exact[name], name)


def assert_near(got, value, total, off, length, name: str) -> None:
    """C1, beside the rounding of dh."""
    bound = 1.05 * UNIT[got.dtype] * value.abs() + (length + 5) * 2.0**-23 * total
    bound = bound + 1.1 * off + 2.0**-24 * (got.dtype == torch.float16) + 2.0**-133
    assert ((got.double() - value).abs() <= bound).all(), name


def fits_one_grid(shape, seed) -> bool:
    transposed = shape[:3] == (1, 1, 1) and seed is None  # a single weight lies either way
    return 1 <= shape[3] <= 64 and min(shape) > 0 and not transposed


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", (SHAPES | MORE).values(), ids=SHAPES | MORE)
def test_shapes(emulated, shape, form, seed):
    step = Step(shape, seed=seed)
    wanted = NAMES if form == "passes" else NAMES[:3]
    if form == "one_grid" and not fits_one_grid(shape, seed):
        with pytest.raises(
            ValueError, match=r"r is more than 64|no LoRA term|not all three|is transposed"
        ):
            step.run(emulated, wanted=wanted, form=form)
        return
    (results,), found = step.run(emulated, wanted=wanted, form=form)
    step.check(results)
    assert found["bank_conflicts"] == 0 and found["form"] == form
    assert ("backward_sm90" in found["kernels"]) == (form == "one_grid")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tile_n", [128, 192, 256])
def test_every_tile(emulated, tile_n, dtype, form):
    """An edge of columns, several groups of rows, masked or not, gradients in fp32 or not."""
    for seed, wide in ((None, True), ([1, 2], False)):
        step = Step((1100, 136, 2 * tile_n - 56, 24), dtype, seed, wide)
        if form == "one_grid" and tile_n == 192:
            with pytest.raises(ValueError, match="its tile has no such kernel"):
                step.run(emulated, wanted=NAMES[:3], form=form, tile_n=tile_n)
            continue
        (results,), found = step.run(
            emulated, wanted=NAMES[:3], form=form, tile_n=tile_n, group=2, multiprocessors=6
        )
        step.check(results)
        assert (found["form"], found["tile_n"]) == (form, tile_n)


# what is wanted, and the kernels that are enough for it
SUBSETS = {
    ("dx",): ["down_proj_sm90", "fused_gemm_sm90"],
    ("da",): ["down_proj_sm90", "weight_grad_sm90", "reduce"],
    ("db",): ["weight_grad_sm90", "reduce"],
    ("dbias",): ["weight_grad_sm90", "reduce"],
    ("dx", "da"): ["down_proj_sm90", "fused_gemm_sm90", "weight_grad_sm90", "reduce"],
    ("dx", "db"): ["weight_grad_sm90", "reduce", "fused_gemm_sm90", "reduce"],
    ("da", "db"): ["weight_grad_sm90", "reduce", "weight_grad_sm90", "reduce"],
    ("dx", "dbias"): [
        "weight_grad_sm90", "down_proj_sm90", "fused_gemm_sm90", "reduce",
    ],
    NAMES: [
        "weight_grad_sm90", "reduce", "fused_gemm_sm90", "weight_grad_sm90", "reduce",
    ],
    NAMES[:3]: ["pack", "zero", "backward_sm90"],
    (): [],
}  # fmt: skip


@pytest.mark.parametrize("wanted", SUBSETS, ids="_".join)
def test_only_what_is_wanted_is_computed(emulated, wanted):
    step = Step((300, 136, 200, 16), seed=[1, 2])
    if "da" not in wanted:
        step.without_x()
    form = "one_grid" if wanted == NAMES[:3] else ""
    (results,), found = step.run(emulated, wanted=wanted, form=form)
    if results:
        step.check(results)
    assert found["kernels"] == SUBSETS[wanted]


def some(fast, others):
    """Cases that have every value of each parameter, and those that are left, which are slow."""
    return [*fast, *(pytest.param(*case, marks=pytest.mark.slow) for case in others)]


@pytest.mark.parametrize(
    "rank, form",
    some([(16, "one_grid"), (64, "passes")], [(64, "one_grid"), (16, "passes")]),
)
def test_any_timing_gives_the_same_bits(emulated, rank, form):
    step = Step((1100, 200, 264, rank), seed=[1, 2])
    options = dict(wanted=NAMES[:3], form=form, tile_n=128, group=2, multiprocessors=6)
    (first,), _ = step.run(emulated, timing="early", **options)
    step.check(first)
    for timing, schedule in [*SCHEDULES, ("random", 4), ("random", 5)]:
        (again,), _ = step.run(emulated, timing=timing, schedule=schedule, **options)
        assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize("timing, schedule", SCHEDULES)
@pytest.mark.parametrize("copies, resident", some([(1, 2), (2, 6)], [(1, 6), (2, 2)]))
def test_progress_needs_no_residency(emulated, copies, resident, timing, schedule):
    """One cluster of each grid, or of one of them, is enough; grids do not disturb each other."""
    step = Step((1300, 136, 264, 16), seed=[1, 2])
    many, found = step.run(
        emulated, copies, wanted=NAMES[:3], form="one_grid", tile_n=128, group=2,
        multiprocessors=8, resident_blocks=resident, timing=timing, schedule=schedule,
    )  # fmt: skip
    assert found["clusters"] == 4
    for results in many:
        step.check(results)
        assert all(torch.equal(results[name], many[0][name]) for name in results)


@pytest.mark.parametrize("r", [16, 24])
def test_dy_and_x_are_read_once_beside_the_gemm(emulated, r):
    """Bytes from memory of either form: no mask, nothing twice; up to 16 ranks one grid has copies
    of h and B that lie turned."""
    m, n, k = 512, 256, 512
    step = Step((m, n, k, r))
    pairs, columns = 2, 2
    gemm = columns * m * (n + r) + pairs * k * (n + r)
    _, found = step.run(emulated, wanted=NAMES[:3], form="passes", tile_n=256)
    chunks, (over_n, over_k) = found["chunks"], found["splits"]
    assert chunks == 1 and found["rank"] == 64
    dy_pass = m * n + over_n * m * r + 4 * n * r  # B again for every stage of 128 rows
    x_pass = m * k + over_k * m * r
    sums = 4 * (over_n * m * r + chunks * (n + k) * r)
    assert found["bytes_loaded"] == 2 * (gemm + dy_pass + x_pass) + sums
    _, found = step.run(emulated, wanted=NAMES[:3], form="one_grid", tile_n=256)
    dy_pass, x_pass = m * n + m * r + 2 * n * r, m * k + m * r
    sums, copied = 4 * 2 * (n + k) * r, (m + n) * r if r == 16 else 0
    assert found["bytes_loaded"] == 2 * (gemm + dy_pass + x_pass + copied) + sums


@pytest.mark.parametrize("form", FORMS)
def test_fault_23_dropped_elements_are_selected_not_multiplied(emulated, form):
    """Inf and NaN of x, A and dy go where autograd lets them go, and nowhere else."""
    m, _, k, _ = shape = (300, 136, 136, 8)
    mask = dropout.reference_mask(torch.tensor([1, 2]), m, k, THRESHOLD)
    (row, col) = (~mask).nonzero()[300].tolist()
    (kept_row, kept_col) = next(p for p in mask.nonzero().tolist() if p[0] > 9 and p[1] != col)
    options = dict(wanted=NAMES[:3], form=form)
    (clean,), _ = Step(shape, seed=[1, 2]).run(emulated, **options)

    step = Step(shape, seed=[1, 2])
    step.x[row, col] = torch.inf
    (found,), _ = step.run(emulated, **options)
    assert all(torch.equal(found[name], clean[name]) for name in found)

    step.x[kept_row, kept_col] = torch.nan
    (found,), _ = step.run(emulated, **options)
    others = torch.arange(k) != kept_col
    assert found["da"][:, kept_col].isnan().all()
    assert torch.equal(found["da"][:, others], clean["da"][:, others])
    assert torch.equal(found["dx"], clean["dx"]) and torch.equal(found["db"], clean["db"])

    step = Step(shape, seed=[1, 2])
    step.a[3, col] = torch.inf
    (found,), _ = step.run(emulated, **options)
    assert not found["dx"][mask[:, col], col].isfinite().any()
    assert torch.equal(found["dx"][~mask[:, col], col], clean["dx"][~mask[:, col], col])
    others = torch.arange(k) != col
    assert torch.equal(found["dx"][:, others], clean["dx"][:, others])

    step = Step(shape, seed=[1, 2])
    step.dy[kept_row, 5] = torch.nan
    (found,), _ = step.run(emulated, **options)
    others = torch.arange(m) != kept_row
    assert found["dx"][kept_row].isnan().all() and found["db"][5].isnan().all()
    assert torch.equal(found["dx"][others], clean["dx"][others])


STEP_VIEWS = VIEWS | {
    "one_value": lambda t: t[:1, :1].expand_as(t),  # what sum().backward() hands in
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operand", ["dy", "x", "weight", "a", "b", "h"])
@pytest.mark.parametrize("view", STEP_VIEWS.values(), ids=STEP_VIEWS)
def test_any_strides(emulated, view, operand, form):
    """What TMA cannot address is copied inside, and the plan says so."""
    step = Step((140, 136, 72, 24), seed=[1, 2, 3, 5])
    setattr(step, operand, view(getattr(step, operand)))
    (results,), found = step.run(emulated, wanted=NAMES[:3], form=form)
    step.check(results)
    assert ("copied first" in found["text"]) == ("pack" in found["kernels"])


def test_strided_results(emulated):
    """Gradients into memory of others: a dx that TMA cannot store, dA transposed, dB with gaps."""
    step = Step((300, 136, 72, 10), wide=True)
    for form in FORMS:
        around = torch.zeros(300, 75, dtype=step.dtype)
        results = {
            "dx": around[:, 1:73],
            "da": torch.zeros(72, 10).t(),
            "db": torch.zeros(136, 12)[:, :10],
        }
        emulated.backward(step.operands(), [step.given(results)], step.options(form=form))
        step.check(results)
        # The emulator poisons all memory from the first to the last element of a result.
        assert around[:, 73:].isnan().sum() == 2 * 299 and around[0, 0] == 0


@pytest.mark.parametrize("form", FORMS)
def test_every_launch_may_fail(emulated, form):
    """The one that fails is the last."""
    step = Step((300, 136, 67, 7))
    wanted = NAMES[:3] if form == "one_grid" else NAMES
    _, found = step.run(emulated, wanted=wanted, form=form)
    for number in range(len(found["kernels"])):
        _, failed = step.run(emulated, wanted=wanted, form=form, fails=number)
        assert failed["kernels"] == found["kernels"][: number + 1]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("m, k, r", [(600, 200, 16), (131, 67, 7), (300, 72, 100), (1, 8, 1)])
def test_weight_grad_alone(emulated, m, k, r, seed, transpose):
    step = Step((m, 8, k, r), seed=seed, wide=transpose)
    grad = step.results(("da",))["da"]
    grad = torch.empty(k, r, dtype=grad.dtype).t() if transpose else grad
    found = emulated.weight_grad(
        bits(step.h), bits(step.x), Step.given({"da": grad})["da"], step.options()
    )
    mask = torch.ones(m, k, dtype=torch.bool)
    if seed:
        mask = dropout.reference_mask(torch.tensor(seed), m, k, THRESHOLD)
    dropped = torch.where(mask, step.x.double(), 0)
    close(
        grad, UP * step.h.double().T @ dropped, UP * step.h.double().abs().T @ dropped.abs(), m + 5
    )
    assert ("pack" in found["kernels"]) == (m > 1 and (k % 8 != 0 or r % 8 != 0))


def test_every_item_waits_for_smaller_numbers_only(emulated):
    """And every piece of work is there once."""
    dy, dx, sum_b, x, sum_a = range(5)
    for pairs, columns, group, first in itertools.product(
        (1, 2, 5, 12), (1, 3), (2, 4, 12), (False, True)
    ):
        group = min(group, pairs)
        for sums_b, slices, sums_a in ((1, 1, 1), (3, 4, 2)):
            places = emulated.backward_order(pairs, columns, group, first, sums_b, slices, sums_a)
            at = {place: number for number, place in enumerate(places)}
            chunks = range((pairs + 1) // 2)
            assert (
                len(at)
                == len(places)
                == (pairs * columns + sums_b + len(chunks) + slices * (len(chunks) + sums_a))
            )
            for pair, column in itertools.product(range(pairs), range(columns)):
                assert at[dx, pair, column, 0, 0] > at[dy, pair // 2 * 2, 0, 0, 0]
            for chunk, s in itertools.product(chunks, range(slices)):
                assert at[x, 0, 0, s, chunk] > at[dy, 2 * chunk, 0, 0, 0]
                for index in range(sums_a):
                    assert at[sum_a, 0, 0, s, index] > at[x, 0, 0, s, chunk]
                for index in range(sums_b):
                    assert at[sum_b, 0, 0, 0, index] > at[dy, 2 * chunk, 0, 0, 0]


# ---- on a device --------------------------------------------------------------------------------


def on_device(step: Step, form: str, wanted=NAMES, tile_n=0, runs=2) -> dict[str, torch.Tensor]:
    """The gradients of `runs` runs, which give the same bits."""
    operands = (moved(t, "cuda") for t in (step.dy, step.x, step.weight, step.a, step.b, step.h))
    seed = None if step.seed is None else torch.tensor(step.seed, device="cuda")
    keep = 1 if seed is None else (dropout.RANGE - THRESHOLD) / dropout.RANGE
    step.db_scale = UP * keep  # ops divide by q where there is a mask: not in dB
    call = functools.partial(
        torch.ops.lora_kernels.backward_as, *operands, seed, THRESHOLD, SCALE, UP * keep,
        step.wide, step.wide, *(name in wanted for name in NAMES), form, tile_n, 0,
    )  # fmt: skip
    first = call()
    for _ in range(runs - 1):
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))
    return {n: t for n, t in zip(NAMES, first, strict=True) if n in wanted}


@pytest.mark.gpu
@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "shape", [*(SHAPES | MORE).values(), (4096, 1536, 2048, 16), (3000, 1000, 1000, 48)]
)
def test_on_the_gpu(hopper, shape, form, seed):
    if form == "one_grid" and not fits_one_grid(shape, seed):
        pytest.skip("passes serve it")
    step = Step(shape, seed=seed)
    wanted = NAMES if form == "passes" else NAMES[:3]
    step.check(on_device(step, form, wanted))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("tile_n", [128, 192, 256])
def test_every_tile_on_the_gpu(hopper, tile_n, dtype, form):
    if form == "one_grid" and tile_n == 192:
        pytest.skip("passes serve it")
    for seed in (None, [1, 2]):
        step = Step((2500, 1096, 1800, 24), dtype, seed, wide=True)
        step.check(on_device(step, form, NAMES[:3], tile_n))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_250_repeats_give_the_same_bits(hopper, form):
    """While another stream holds part of the device."""
    step = Step((4096, 1024, 1024, 16), seed=[3, 4])
    busy = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        for _ in range(100):
            torch.mm(busy, busy)
    step.check(on_device(step, form, NAMES[:3], runs=250))
