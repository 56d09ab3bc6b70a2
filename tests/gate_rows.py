"""What tests/gates.py expects of each kernel. Another kernel needs a row in EXPECTED."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

WATCHED = ("HGMMA", "UTMALDG", "UTMASTG", "HMMA", "LDGSTS", "LDSM", "STSM")
# wgmma with a transposed operand; GPU-wide fences: a release to the device, and both arrivals of a
# kernel at the barrier of its cluster
FORMS = ("tnspA", "tnspB", "MEMBAR.GPU")


@dataclass(frozen=True)
class Row:
    """What kernels named like `pattern` must contain when compiled for `arch`.

    Args:
        pattern: regular expression, matched against the whole `Kernel.name`.
        arch: "80", "90a" or None for every architecture.
        opcodes: count, or (least, most), of each WATCHED opcode and of FORMS; one that is left out
            must be absent. None for most: no limit.
    """

    pattern: str
    arch: str | None = None
    opcodes: Mapping[str, int | tuple[int, int | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Allowance:
    """What else would be a problem, and why it is none in kernels named like `pattern`."""

    pattern: str
    reason: str
    arch: str | None = None
    spilled: int = 0  # bytes stored, most
    stack: int = 0  # bytes, most
    fences: int = 0  # GPU-wide ones in main loops, most


def term(n: int) -> dict[str, int]:
    """The masked LoRA term of a tile of n columns."""
    return {"HMMA": n // 2, "LDSM": 4 + n // 4}


EXPECTED: tuple[Row, ...] = (
    Row("dropout_mask_kernel"),
    # <tile, dtype>
    Row(
        "down_proj_sm80_kernel<.*>",
        None,
        {"HMMA": (4, None), "LDGSTS": (4, None), "LDSM": (5, None)},
    ),
    # <tile, dtype>: of each stage and warp two k16 steps, with an ldmatrix for each 16 rows of x
    # and for each unit of A and W, and two products for each pair of them; the same for one of
    # either in a step of the up projection. A copy for each 32 rows of a stage and one of B; both
    # arrivals at the barrier of a cluster
    *(
        Row(
            f"decode_kernel<DecodeTile<{m}, {rows}, .*>",
            arch,
            {
                "HMMA": 2 * 2 * (m // 16) * (rows // 64) + 2,
                "LDSM": 2 * (m // 16 + rows // 64) + 2,
                "LDGSTS": rows // 32 + -(-m // 32) + 1,
                "MEMBAR.GPU": fences,
            },
        )
        for m in (16, 64)
        for rows in (64, 192)
        for arch, fences in (("80", 0), ("90a", 2))
    ),
    # <tile, dtype, MN-major>: a stage is two k16 steps of `parts` by `parts` fragments; each thread
    # copies `loads` chunks of it to fill the ring, and again in the loop, in front of which one
    # more step is loaded. MN-major also has the masked term, twice, since nvcc peels its loop.
    *(
        Row(f"fused_gemm_sm80_kernel<FusedGemmSm80Tile<{m}, {n}, .*>, .*, {form}>", None, opcodes)
        for m, n, parts, loads in ((128, 256, 4, 6), (128, 128, 4, 8), (64, 64, 2, 4))
        for form, opcodes in (
            ("false", {"HMMA": 4 * parts**2, "LDGSTS": 2 * loads, "LDSM": 6 * parts}),
            (
                "true",
                {
                    "HMMA": 12 * parts**2,
                    "LDGSTS": 4 * loads,
                    "LDSM": 6 * parts + 4 * parts * (parts + 1),
                },
            ),
        )
    ),
    # <tile, dtype, MN-major>: a stage is four k16 steps and two loads, more for panels; K-major has
    # a loop of masked stages besides, with an ldmatrix a step
    Row("down_proj_sm90_kernel<.*, false>", "90a", {"HGMMA": 8, "UTMALDG": 2, "LDSM": 4}),
    Row("down_proj_sm90_kernel<.*, true>", "90a", {"HGMMA": 4, "tnspB": 4, "UTMALDG": (2, 5)}),
    Row("pack_kernel|zero_kernel"),
    # <tile, dtype, MN-major, masked>: four k16 steps, and a loop of one for the LoRA term; two
    # loads a stage of either, or one and one a panel; N / 16 stmatrix and N / 64 stores a tile.
    # Masked: the term by mma.sync, two and an ldmatrix a k16 step of 16 columns, beside four of h.
    *(
        row
        for n in (256, 192, 128)
        for row in (
            Row(
                f"fused_gemm_sm90_kernel<FusedGemmSm90Tile<{n}, .*>, .*, {form}>",
                "90a",
                {"STSM": n // 16, "UTMASTG": n // 64, "MEMBAR.GPU": 2} | more,
            )
            for form, more in (
                ("false, false", {"HGMMA": 5, "UTMALDG": 4}),
                ("true, false", {"HGMMA": 5, "tnspB": 5, "UTMALDG": 2 + n // 32}),
                ("true, true", {"HGMMA": 4, "tnspB": 4, "UTMALDG": 2 + n // 32} | term(n)),
            )
        )
    ),
    # <tile, dtype, ranks>: two loads a stage of h besides; of an even and of an odd stage four k16
    # steps each, and four with an ldmatrix each under dropout
    *(
        Row(
            f"forward_sm90_kernel<FusedGemmSm90Tile<{n}, .*>, .*>",
            "90a",
            {
                "HGMMA": 21,
                "UTMALDG": 6,
                "STSM": n // 16,
                "UTMASTG": n // 64,
                "MEMBAR.GPU": 3,
                "LDSM": 8,
            },
        )
        for n in (256, 192, 128)
    ),
    Row("reduce_kernel"),
    # <tile, dtype, down projection>: of each stage of a chunk eight k16 steps of rows for
    # the gradient, twice for 256 ranks, and eight for the sums of columns, of which x is
    # transposed; four of columns for the down projection. A load of x, one for each panel of down,
    # those of a chunk of h. Without down: ldmatrix and stmatrix of x to mask it, aligned and not.
    *(
        Row(
            f"weight_grad_sm90_kernel<WeightGradSm90Tile<{rank}, {subs}, .*>, .*, {form}>",
            "90a",
            {
                "HGMMA": columns + 8 * subs + rows,
                "tnspA": columns + 8 * subs,
                "tnspB": columns + rows,
                "UTMALDG": 1 + rank // 64 * subs + down,
            }
            | more,
        )
        for rank, subs in ((64, 4), (128, 2), (256, 1))
        for columns in (8 * subs * max(1, rank // 128),)
        for form, rows, down, more in (
            ("true", 4 * subs, rank // 64, {}),
            ("false", 0, 0, {"LDSM": 5 * subs, "STSM": 5 * subs}),
        )
    ),
    # <tile, dtype>: of a stage four k16 steps, a product for each eight ranks and one for the sums
    # of columns, ldmatrix of x, masked or not, and of 16 ranks of h; its loads twice, to fill the
    # ring and in the main loop, four of x a thread
    *(
        Row(
            f"weight_grad_sm80_kernel<WeightGradSm80Tile<{rank}, .*>, .*>",
            None,
            {
                "HMMA": 4 * (rank // 8 + 1),
                "LDGSTS": 4 + max(1, rank // 32),
                "LDSM": 4 * (2 + rank // 16),
            },
        )
        for rank in (16, 64, 128)
    ),
    # <tile, dtype, ranks>: dx as in fused_gemm, plain and masked, dh and dB of dy, dA of x as in
    # weight_grad, without sums of columns; a release for each flag of dh and for either counter. 16
    # ranks lie as rows: chunks come by two loads for one, and the products do not transpose them
    *(
        Row(
            f"backward_sm90_kernel<FusedGemmSm90Tile<{n}, .*>, .*, {rank}>",
            "90a",
            {
                "HGMMA": 5 + 4 + 2 * (8 + 4) + 2 * 8,
                "tnspA": 2 * 8 + 2 * 8,
                "tnspB": 5 + 4 + (2 * (8 + 4) + 2 * 8 if rank == 64 else 0),
                "UTMALDG": 2 + n // 32 + 2 + 2 + 1 + 2 + (4 if rank == 16 else 0),
                "HMMA": n // 2,
                "LDSM": 4 + n // 4 + 10,
                "STSM": n // 16 + 10,
                "UTMASTG": n // 64,
                "MEMBAR.GPU": 2 + 2 + 2,
            },
        )
        for n in (256, 128)
        for rank in (16, 64)
    ),
    # <dtype, N, a transposed, b transposed>: N / 16 stmatrix and N / 64 stores a tile
    Row(
        "gemm_probe<.*>",
        "90a",
        {"HGMMA": 4, "UTMALDG": (2, 4), "STSM": (8, 16), "UTMASTG": (2, 4)}
        | {"tnspA": (0, 4), "tnspB": (0, 4), "MEMBAR.GPU": 2},
    ),
    Row("relay_probe", "90a", {"UTMALDG": 1, "UTMASTG": 1, "MEMBAR.GPU": 1}),
)
ALLOWED: tuple[Allowance, ...] = (
    Allowance("relay_probe", "hands each tile to another block: one release an item", fences=1),
)
