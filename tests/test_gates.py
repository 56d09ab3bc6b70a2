"""The gates of tests/gates.py on every kernel, and a proof that each of them can fail."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import gates
import pytest
import sass
from gates import Allowance, Kernel, Row

pytestmark = pytest.mark.xdist_group("gates")  # one worker keeps what it compiled and read
BUILD_SECONDS = 60
FLAWED = Path(__file__).with_name("flawed_kernels.cu")


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = gates.find_nvcc()
    return found or pytest.skip("no nvcc")


@pytest.fixture(scope="module")
def nvdisasm() -> str:
    found = sass.find_nvdisasm()
    if found is None and Path(sys.prefix).resolve() == (gates.ROOT / ".venv").resolve():
        pytest.fail("no nvdisasm, though requirements-dev.txt pins it for this environment")
    return found or pytest.skip("no nvdisasm: pip install -r requirements-dev.txt")


@pytest.fixture(scope="module")
def built(nvcc) -> list[gates.Compiled]:
    return gates.compile_all(nvcc)


@pytest.fixture(scope="module")
def kernels(built, nvdisasm) -> list[Kernel]:
    return gates.read_kernels(built, nvdisasm)


@pytest.fixture(scope="module")
def flawed(nvcc, nvdisasm, tmp_path_factory) -> dict[str, Kernel]:
    """The kernels of flawed_kernels.cu, by what is wrong with them."""
    cache = tmp_path_factory.mktemp("flawed")
    read = gates.read_kernels(gates.compile_all(nvcc, [FLAWED], ["90a"], cache), nvdisasm)
    flaws = {"0": "none", "1": "prints", "2": "releases", "spill": "spill"}
    return {name: k for k in read for key, name in flaws.items() if key in k.name}


# ---- the kernels ---------------------------------------------------------------------------------


def test_log(built):
    """What ptxas says, for a machine where the machine code cannot be read."""
    found = [p for k in gates.read_kernels(built, None) for p in gates.problems(k)]
    assert not found, "\n".join(found)


def test_machine_code(kernels):
    found = [p for k in kernels for p in gates.problems(k)]
    assert not found, "\n".join(found)


def test_no_stale_rule(kernels):
    for rule in (*gates.EXPECTED, *gates.ALLOWED):
        assert any(gates.matches(rule, k) for k in kernels), f"no kernel is named like {rule}"


def test_page_is_current(kernels, nvcc, emulated):
    version = gates.nvcc_version(nvcc)
    if gates.page_version() not in (None, version):
        pytest.skip(f"docs/kernels.md is of nvcc {gates.page_version()}, this is {version}")
    current = gates.PAGE.read_text() if gates.PAGE.exists() else ""
    expected = gates.page(kernels, version, emulated.shared_bytes())
    assert current == expected, "run python tests/gates.py --write"


def test_build_time(nvcc, built, tmp_path):
    """Three times before it is too slow: what else the machine did can only lengthen a time."""
    runs = [[unit for unit in built if unit.source in gates.SHIPPED]]
    sources = gates.slowest(runs[0], share=0.8)
    for repeat in ("second", "third"):
        if gates.build_seconds(*runs) >= BUILD_SECONDS:
            runs.append(gates.compile_all(nvcc, sources, cache=tmp_path / repeat))
    times = (
        f"{u.source.name} sm_{u.arch}: {u.seconds:.1f} / {u.pace:.2f}" for run in runs for u in run
    )
    assert gates.build_seconds(*runs) < BUILD_SECONDS, (
        "user CPU seconds of nvcc / how much slower than its best the machine was:\n"
        + "\n".join(times)
    )


def test_compiled_once(nvcc, built):
    before = [unit.cubin.stat().st_mtime_ns for unit in built]
    again = gates.compile_all(nvcc)
    assert again == built and [unit.cubin.stat().st_mtime_ns for unit in again] == before


# ---- the gates -----------------------------------------------------------------------------------

# Fences are the main loop's matter here, not the row's.
SOUND = Row("flawed::gemm<.*>", "90a", {"HGMMA": (4, None), "MEMBAR.GPU": (0, None)})


@pytest.mark.parametrize(
    "name, messages",
    [
        ("none", []),
        ("prints", ["ptxas remark C7510", "stack frame of 8 bytes", "wgmma is serialised"]),
        ("releases", ["GPU-wide fences"]),
        ("spill", ["spills", "stack frame"]),
    ],
)
def test_flaw_is_found(flawed, name, messages):
    found = gates.problems(flawed[name], [SOUND, Row("flawed::spill")])
    assert len(found) == len(messages), found
    for problem, message in zip(found, messages, strict=True):
        assert message in problem and "flawed_kernels.cu, sm_90a, flawed::" in problem


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "0 rows"),
        ([dataclasses.replace(SOUND, arch="80")], "0 rows"),
        ([dataclasses.replace(SOUND, pattern="flawed::gem")], "0 rows"),
        ([SOUND, SOUND], "2 rows"),
        ([dataclasses.replace(SOUND, opcodes={})], "HGMMA, expected 0 to 0"),
        ([dataclasses.replace(SOUND, opcodes={"HGMMA": (999, None)})], "expected 999 or more"),
        ([dataclasses.replace(SOUND, opcodes={"HGMMA": (4, None), "STSM": 4})], "0 STSM"),
    ],
)
def test_row_is_held_to(flawed, rows, message):
    (problem,) = gates.problems(flawed["none"], rows)
    assert message in problem


def test_allowance(flawed):
    rows = [SOUND, Row("flawed::spill")]
    spill = Allowance("flawed::spill", "a test", spilled=4096, stack=4096)
    assert not gates.problems(flawed["spill"], rows, [spill])
    small = dataclasses.replace(spill, spilled=4)
    assert len(gates.problems(flawed["spill"], rows, [small])) == 1
    fences = Allowance("flawed::gemm.*", "a test", fences=99)
    assert not gates.problems(flawed["releases"], rows, [fences])
    assert gates.problems(flawed["releases"], rows, [dataclasses.replace(fences, arch="80")])


def test_slow_build_is_found():
    def unit(source, arch, seconds):
        return gates.Compiled(Path(source), arch, Path(), "", seconds, pace=1.0)

    assert gates.build_seconds([unit("a", "80", 50), unit("b", "80", 30)]) == 50
    assert gates.build_seconds([unit("a", "80", 50), unit("a", "90a", 30)]) == 80
    assert gates.build_seconds([unit(s, "80", 50) for s in "abc"]) == 75
    assert gates.build_seconds([unit("a", "80", 50)], [unit("a", "80", 40)]) == 40
    runs = [unit("a", "80", 50), unit("b", "80", 30)], [unit("a", "80", 40)], [unit("a", "80", 45)]
    assert gates.build_seconds(*runs) == 40, "what is compiled once counts too"


def test_the_slowest_sources_are_compiled_again():
    def unit(source, seconds, pace=1.0):
        return gates.Compiled(Path(source), "80", Path(), "", seconds, pace)

    units = [unit("a", 10), unit("b", 60), unit("c", 25), unit("c", 1), unit("d", 40, pace=10.0)]
    assert gates.slowest(units, share=0.5) == [Path("b")]
    assert gates.slowest(units, share=0.8) == [Path("b"), Path("c")]
    assert gates.slowest(units, share=1.0) == [Path(name) for name in "bcad"]


def test_page_depends_on_what_it_shows():
    kernel = Kernel(
        "a.cu", "80", "a", name="a", registers=32, code=[sass.Instruction("HMMA.16816")]
    )
    page = gates.page([kernel], "13.0")
    assert "| `a` | 32 | 0 | 0 | 0 | 0 | 0 | 1 | 1 |" in page
    for change in ({"registers": 33}, {"code": []}, {"name": "b"}, {"shared": 4}):
        assert gates.page([dataclasses.replace(kernel, **change)], "13.0") != page
    types = [dataclasses.replace(kernel, name=f"a<{t}>") for t in ("ptx::f16", "ptx::bf16")]
    assert gates.page(types, "13.0").count("| 32 |") == 1
    types[0].registers = 33
    assert "| `a<ptx::bf16>` | 32 |" in gates.page(types, "13.0")
    assert "| 1024 |" in gates.page([kernel], "13.0", {"a": 1024})


def test_empty_kernel_needs_no_row():
    code = [sass.Instruction(opcode) for opcode in ("MOV", "EXIT", "BRA", "NOP")]
    kernel = Kernel("a.cu", "80", "a", name="a", code=code)
    assert not gates.problems(kernel, []) and "`a`" not in gates.page([kernel], "13.0")
    assert gates.problems(kernel, [Row("a", opcodes={"HMMA": 1})])
    kernel.code = [*code, sass.Instruction("STG.E")]
    assert gates.problems(kernel, [])


LISTING = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0020*/              @!P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0030*/                   LDSM.16.M88.4 R4, [R3] ;
.L_x_2:
        /*0040*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0050*/                   BRA.U UP0, `(.L_x_2) ;
        /*0060*/                   {fence} ;
        /*0070*/               @P1 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*00a0*/              @!P0 BRA `(.L_x_3) ;
        /*00b0*/                   BRA `(.L_x_1) ;
.L_x_4:
        /*00c0*/                   BRA `(.L_x_4);
"""


def test_loops():
    """Two nested loops, and a wait whose slow path lies behind the end and jumps back."""
    (code,) = sass.parse(LISTING.format(fence="MEMBAR.ALL.GPU")).values()
    found = {tuple(sorted(loop)) for loop in sass.loops(code)}
    assert found == {(4, 5), (9, 10), (1, 2, 3, 4, 5, 6, 7, 9, 10, 11)}
    assert sass.fences_in_main_loops(code) == 0, "the outer loop may publish"
    assert sass.counts(code)["SYNCS"] == 2 and sass.count(code, "SYNCS.PHASECHK") == 2


@pytest.mark.parametrize(
    "fence, count", [("MEMBAR.SC.GPU", 1), ("MEMBAR.ALL.SYS", 1), ("MEMBAR.ALL.CTA", 0)]
)
def test_fence_in_main_loop(fence, count):
    listing = LISTING.format(fence=fence).replace("BRA.U UP0, `(.L_x_2)", "NOP")
    (code,) = sass.parse(listing).values()
    assert sass.fences_in_main_loops(code) == count
