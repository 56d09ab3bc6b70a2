"""What tests/gates.py expects of each kernel. Another kernel needs a row in EXPECTED."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

WATCHED = ("HGMMA", "UTMALDG", "UTMASTG", "HMMA", "LDGSTS", "LDSM", "STSM")


@dataclass(frozen=True)
class Row:
    """What kernels named like `pattern` must contain when compiled for `arch`.

    Args:
        pattern: regular expression, matched against the whole `Kernel.name`.
        arch: "80", "90a" or None for every architecture.
        opcodes: count, or (least, most), of each WATCHED opcode; one that is left out must be
            absent. None for most: no limit.
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


EXPECTED: tuple[Row, ...] = (
    Row("dropout_mask_kernel"),
    # <tile, dtype, 16-byte copies>
    Row(
        "down_proj_sm80_kernel<.*, true>",
        opcodes={"HMMA": (4, None), "LDGSTS": (8, None), "LDSM": (5, None)},
    ),
    Row("down_proj_sm80_kernel<.*, false>", opcodes={"HMMA": (4, None), "LDSM": (5, None)}),
    # <tile, dtype, MN-major, dropout>: a stage is four k16 steps and two loads, more for panels
    Row("down_proj_sm90_kernel<.*, false, false>", "90a", {"HGMMA": 4, "UTMALDG": 2}),
    Row("down_proj_sm90_kernel<.*, true, false>", "90a", {"HGMMA": 4, "UTMALDG": (2, 5)}),
    Row("down_proj_sm90_kernel<.*, false, true>", "90a", {"HGMMA": 4, "UTMALDG": 2, "LDSM": 4}),
    Row("pack_kernel|zero_kernel"),
    # <tile, dtype, MN-major>: four k16 steps, and a loop of one for the LoRA term; two loads a
    # stage of either, or one and one a panel; N / 16 stmatrix and N / 64 stores a tile
    *(
        row
        for n in (256, 192, 128)
        for row in (
            Row(
                f"fused_gemm_sm90_kernel<FusedGemmSm90Tile<{n}, .*>, .*, {mn}>",
                "90a",
                {"HGMMA": 5, "UTMALDG": loads, "STSM": n // 16, "UTMASTG": n // 64},
            )
            for mn, loads in (("false", 4), ("true", 2 + 2 * n // 64))
        )
    ),
    # <tile, dtype, ranks, dropout>: four k16 steps and two loads a stage of h besides
    *(
        Row(
            f"forward_sm90_kernel<FusedGemmSm90Tile<{n}, .*>, .*, {dropout}>",
            "90a",
            {"HGMMA": 9, "UTMALDG": 6, "STSM": n // 16, "UTMASTG": n // 64} | more,
        )
        for n in (256, 192, 128)
        for dropout, more in (("false", {}), ("true", {"LDSM": 4}))
    ),
    # <dtype, N, a transposed, b transposed>: N / 16 stmatrix and N / 64 stores a tile
    Row(
        "gemm_probe<.*>",
        "90a",
        {"HGMMA": 4, "UTMALDG": (2, 4), "STSM": (8, 16), "UTMASTG": (2, 4)},
    ),
    Row("relay_probe", "90a", {"UTMALDG": 1, "UTMASTG": 1}),
)
ALLOWED: tuple[Allowance, ...] = (
    Allowance("relay_probe", "hands each tile to another block: one release an item", fences=1),
)
