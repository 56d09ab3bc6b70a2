"""The problems that a mutant has to fail: `python -m emulator.suite LIBRARY PROBLEMS`.

numpy alone, so that a process for each mutant costs little; each mutant has one of its own, since
it may crash or hang. Exit code 0: everything is right; 1: the first wrong result or report is
printed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from . import build

SCHEDULES = (("early", 0), ("late", 1), ("random", 2), ("random", 3))
POISON = 0xFFFF  # what the emulator fills outputs with


def bf16(values: np.ndarray) -> np.ndarray:
    """Small integers, exact in bf16, as bit patterns."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


class Wrong(Exception):
    """A result that is not what it must be."""


def views(x: np.ndarray) -> np.ndarray:
    """The same values with a padded, 16-byte aligned row stride."""
    wide = np.zeros((x.shape[0], (x.shape[1] + 7) // 8 * 8 + 8), np.uint16)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def place_of_h(rows: int, r: int, where: int) -> tuple[np.ndarray, np.ndarray]:
    """(h, the memory around it): padded rows; columns apart; transposed; an odd offset."""
    if where == 1:
        base = np.zeros((rows, 2 * r), np.uint16)
        return base[:, ::2], base[:, 1::2]
    if where == 2:
        base = np.zeros((r, rows + 1), np.uint16)
        return base[:, :rows].T, base[:, rows:]
    if where == 3:
        base = np.zeros(rows * r + 2, np.uint16)[1:]
        return base[:-1].reshape(rows, r), base[-1:]
    # Rows of even length with a gap behind them, where an odd rank's last pair would land.
    base = np.zeros((rows, (r + 2) // 2 * 2), np.uint16)
    return base[:, :r], base[:-1, r:]


def far_apart(x: np.ndarray) -> np.ndarray:
    """The same values in rows so far apart that offsets pass 2^31; the gaps cost no memory."""
    stride = (1 << 25) + 8
    base = np.zeros(x.shape[0] * stride, np.uint16)
    apart = np.lib.stride_tricks.as_strided(base, x.shape, (2 * stride, 2))
    apart[:] = x
    return apart


def check_down_proj(emulated, problem: dict[str, np.ndarray], compute: int) -> None:
    x, down, expected = problem["x"], problem["down"], problem["h"]
    if problem["mn_major"]:
        down = np.ascontiguousarray(down.T).T
    if problem["padded"]:
        x, down = views(x), (down if problem["mn_major"] else views(down))
    if problem["far"]:
        x = far_apart(x)
    for turn, (timing, schedule) in enumerate(SCHEDULES):
        h, around = place_of_h(*expected.shape, turn)
        found = emulated.down_proj(
            x, down, h, True, problem["seed"].tolist(), int(problem["threshold"]), 2.0, compute,
            int(problem["multiprocessors"]), schedule, timing, 3,
        )  # fmt: skip
        if not np.array_equal(h, expected):
            raise Wrong(f"{np.sum(h != expected)} elements of h differ")
        if not np.isin(around, (0, POISON)).all():
            raise Wrong("memory beside h was written")
        if found["bank_conflicts"]:
            raise Wrong(f"{found['bank_conflicts']} bank conflicts")


def check_down_proj_group(emulated, problem: dict[str, np.ndarray]) -> None:
    """Each h in a place of its own."""
    options = json.loads(str(problem["options"]))
    downs, expected = ([problem[f"{n}{i}"] for i in range(options["count"])] for n in ("down", "h"))
    for turn, (timing, schedule) in enumerate(SCHEDULES):
        placed = [place_of_h(*e.shape, (turn + i) % 4) for i, e in enumerate(expected)]
        hs, around = zip(*placed, strict=True)
        given = options | {"timing": timing, "schedule": schedule, "resident_blocks": 3}
        found = emulated.down_proj_group(problem["x"], downs, list(hs), given)
        for i, h in enumerate(hs):
            if not np.array_equal(h, expected[i]):
                raise Wrong(f"{np.sum(h != expected[i])} elements of h {i} differ")
            if not np.isin(around[i], (0, POISON)).all():
                raise Wrong(f"memory beside h {i} was written")
        if found["bank_conflicts"]:
            raise Wrong(f"{found['bank_conflicts']} bank conflicts")
        if found["bytes_loaded"] != problem["bytes"]:
            raise Wrong(f"{found['bytes_loaded']} bytes loaded, expected {problem['bytes']}")


def check_forward(emulated, problem: dict[str, np.ndarray]) -> None:
    """y and h of two calls at once; TMA cannot address what `odd` says."""
    options = json.loads(str(problem["options"]))
    x, weight, a, b, bias = (problem[name] for name in ("x", "weight", "a", "b", "bias"))
    if problem["mn_major"]:
        weight = np.ascontiguousarray(weight.T).T
    bias = np.repeat(bias, 2)[::2] if problem["strided_bias"] else bias
    for turn, (timing, schedule) in enumerate(SCHEDULES):
        y = [np.zeros(problem["y"].shape, np.uint16) for _ in range(1 + turn % 2)]
        h = [np.zeros(problem["h"].shape, np.uint16) for _ in y]
        given = {"scale": (2.0, 1.0), "timing": timing, "schedule": schedule} | options
        if len(y) == 2:
            given["resident_blocks"] = 2 + schedule
        found = emulated.forward(x, weight, a, b, bias if len(bias) else None, y, h, given)
        for got, name in ((y, "y"), (h, "h")):
            for array in got:
                if not np.array_equal(array, problem[name]):
                    raise Wrong(f"{np.sum(array != problem[name])} elements of {name} differ")
        if found["bank_conflicts"]:
            raise Wrong(f"{found['bank_conflicts']} bank conflicts")
        read = found["bytes_loaded"]
        if problem["bytes"] and read != len(y) * problem["bytes"]:
            raise Wrong(f"{read} bytes loaded, expected {len(y) * problem['bytes']}")


def check_decode(emulated, problem: dict[str, np.ndarray]) -> None:
    """y and h of one call, h in place where nothing follows; `odd`: layouts without vectors, and y
    in rows further apart."""
    options, odd = json.loads(str(problem["options"])), bool(problem["odd"])
    x, weight, a, b, bias = (problem[name] for name in ("x", "weight", "a", "b", "bias"))
    weight, a = views(weight), views(a)
    if odd:
        x, b = (np.asfortranarray(v) for v in (x, b))
        bias = np.repeat(bias, 3)[::3]
    rows, columns = problem["y"].shape
    for timing, schedule in SCHEDULES[: int(problem["turns"])]:
        around = np.zeros((rows, columns + (3 if odd else 0)), np.uint16)
        y, h = around[:, :columns], np.zeros_like(problem["h"])
        given = {"timing": timing, "schedule": schedule, "resident_blocks": 8 + schedule} | options
        bias_or_none = bias if len(bias) else None
        found = emulated.forward(x, weight, a, b, bias_or_none, [y], [h], given)
        for got, name in ((y, "y"), (h, "h")):
            check_outputs(got, problem[name], name)
        if not np.isin(around[:, columns:], (0, POISON)).all():
            raise Wrong("memory beside y was written")
        check_run(found, ["decode"])
        if found["bytes_loaded"] != problem["bytes"]:
            raise Wrong(f"{found['bytes_loaded']} bytes loaded, expected {problem['bytes']}")


GRADIENTS = ("dx", "da", "db", "dbias")


def check_backward(emulated, problem: dict[str, np.ndarray]) -> None:
    """Runs of `calls` calls at once, for the gradients that `subsets` says of each, or for all;
    those of A and B lie transposed in every other run. `limited`: with few blocks resident."""
    options = json.loads(str(problem["options"]))
    calls, limited = options.pop("calls"), options.pop("limited")
    subsets = options.pop("subsets", None)
    operands = [problem[name] for name in ("dy", "x", "weight", "a", "b", "h")]
    for turn, (timing, schedule) in enumerate(SCHEDULES[: options.pop("turns", None)]):
        wanted = subsets[turn] if subsets else [name for name in GRADIENTS if name in problem]
        orders = {name: "F" if turn % 2 and name in ("da", "db") else "C" for name in wanted}
        results = [
            {name: np.zeros_like(problem[name], order=order) for name, order in orders.items()}
            for _ in range(calls)
        ]
        given = {"timing": timing, "schedule": schedule} | options
        if limited:
            given["resident_blocks"] = 2 * (1 + turn)
        found = emulated.backward(operands, results, given)
        for name, array in ((n, r[n]) for r in results for n in wanted):
            if not np.array_equal(array, problem[name]):
                raise Wrong(f"{np.sum(array != problem[name])} elements of {name} differ")
        if found["bank_conflicts"]:
            raise Wrong(f"{found['bank_conflicts']} bank conflicts")
        if found["form"] != options["form"]:
            raise Wrong(found["reason"])


def check_parts(emulated, problem: dict[str, np.ndarray]) -> None:
    """One pass for `parts` projections: their ranks, scales, seeds and thresholds in `options`;
    with the sums of columns, if the problem has them."""
    options = json.loads(str(problem["options"]))
    parts, expected = options.pop("parts"), options.pop("bytes")
    for timing, schedule in SCHEDULES:
        grads = [np.zeros_like(problem[f"grad{p}"]) for p in range(len(parts))]
        given = [
            (part["first"], grad, part["scale"], part["seed"], part["threshold"])
            for part, grad in zip(parts, grads, strict=True)
        ]
        more = {"timing": timing, "schedule": schedule} | options
        if "sums" in problem:
            more["sums"] = np.zeros_like(problem["sums"])
        found = emulated.weight_grad_group(problem["h"], problem["x"], given, more)
        for p, grad in enumerate(grads):
            if not np.array_equal(grad, problem[f"grad{p}"]):
                raise Wrong(f"{np.sum(grad != problem[f'grad{p}'])} elements of part {p} differ")
        if "sums" in problem:
            check_outputs(more["sums"], problem["sums"], "sums")
        if found["bank_conflicts"]:
            raise Wrong(f"{found['bank_conflicts']} bank conflicts")
        if found["bytes_loaded"] != expected:
            raise Wrong(f"{found['bytes_loaded']} bytes loaded, expected {expected}")


def check_grad80(emulated, problem: dict[str, np.ndarray]) -> None:
    """The same by the sm_80 kernel, of operands that may lie transposed."""
    for name in ("x", "h") if problem["transposed"] else ():
        problem[name] = np.ascontiguousarray(problem[name].T).T
    check_parts(emulated, problem)


def projections_of(problem: dict[str, np.ndarray], *names: str) -> tuple[dict, list[dict]]:
    """(options, and the arrays of these names, or None, of each projection). Those that the options
    say lie transposed in memory."""
    options = json.loads(str(problem["options"]))
    for name in options.pop("transposed", []):
        problem[name] = np.ascontiguousarray(problem[name].T).T
    indices = range(len(options["each"]))
    return options, [{name: problem.get(f"{name}{i}") for name in names} for i in indices]


def check_outputs(got: np.ndarray, expected: np.ndarray, name: str) -> None:
    if not np.array_equal(got, expected):
        raise Wrong(f"{np.sum(got != expected)} elements of {name} differ")


def check_run(found: dict, kernels: list[str]) -> None:
    if found["bank_conflicts"]:
        raise Wrong(f"{found['bank_conflicts']} bank conflicts")
    if found["kernels"] != kernels:
        raise Wrong(f"launched {found['kernels']}")


def check_forward_group(emulated, problem: dict[str, np.ndarray]) -> None:
    """y and h of projections that share x."""
    options, each = projections_of(problem, "weight", "a", "b", "bias", "y", "h")
    own, kernels = options.pop("each"), options.pop("kernels")
    for timing, schedule in SCHEDULES[: options.pop("turns", None)]:
        results = [{name: np.zeros_like(p[name]) for name in ("y", "h")} for p in each]
        operands = [
            [p["weight"], p["a"], p["b"], to["y"], to["h"]]
            for p, to in zip(each, results, strict=True)
        ]
        given = {"timing": timing, "schedule": schedule, "resident_blocks": 2 + schedule} | options
        biases = [p["bias"] for p in each]
        found = emulated.forward_group(problem["x"], operands, biases, own, given)
        for i, (p, to) in enumerate(zip(each, results, strict=True)):
            for name in ("h", "y"):
                check_outputs(to[name], p[name], f"{name} {i}")
        check_run(found, kernels)


def check_backward_group(emulated, problem: dict[str, np.ndarray]) -> None:
    """dx of all projections and those gradients of each that the problem has."""
    names = ("dy", "weight", "a", "b", "h")
    options, each = projections_of(problem, *names, *GRADIENTS)
    own, kernels = options.pop("each"), options.pop("kernels")
    each[0]["dx"] = problem.get("dx")
    operands = [[p[name] for name in names] for p in each]
    for timing, schedule in SCHEDULES[: options.pop("turns", None)]:
        results = [
            {name: np.zeros_like(p[name]) for name in GRADIENTS if p[name] is not None}
            for p in each
        ]
        given = {"timing": timing, "schedule": schedule, "resident_blocks": 2 + schedule} | options
        found = emulated.backward_group(problem["x"], operands, results, own, given)
        for i, (p, to) in enumerate(zip(each, results, strict=True)):
            for name, got in to.items():
                check_outputs(got, p[name], f"{name} {i}")
        check_run(found, kernels)


def place_of_y(rows: int, columns: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """(y, the memory around it): its rows behind one another; a gap between them; at odd places;
    so far apart that offsets pass 2^31."""
    if where == "far":
        return far_apart(np.zeros((rows, columns), np.uint16)), np.zeros(0, np.uint16)
    gap = {"rows": 0, "gaps": 16 - columns % 8, "odd": 3}[where]
    first = int(where == "odd")
    base = np.zeros((rows, columns + gap), np.uint16)
    y = base[:, first : first + columns]
    return y, np.concatenate([base[:-1, first + columns :].ravel(), base[1:, :first].ravel()])


def check_fused_gemm(emulated, problem: dict[str, np.ndarray]) -> None:
    options = json.loads(str(problem["options"]))
    x, weight, h, up, bias = (problem[name] for name in ("x", "weight", "h", "up", "bias"))
    if problem["mn_major"]:
        weight, up = (np.ascontiguousarray(a.T).T for a in (weight, up))
    if problem["place"] == "far":
        x = far_apart(x)
    bias = np.repeat(bias, 2)[::2] if problem["strided_bias"] else bias
    for timing, schedule in SCHEDULES:
        y, around = place_of_y(*problem["y"].shape, str(problem["place"]))
        given = {"timing": timing, "schedule": schedule, "resident_blocks": 2 + schedule} | options
        found = emulated.fused_gemm(x, weight, h, up, bias if len(bias) else None, y, given)
        check_outputs(y, problem["y"], "y")
        if not np.isin(around, (0, POISON)).all():
            raise Wrong("memory beside y was written")
        if found["bank_conflicts"]:
            raise Wrong(f"{found['bank_conflicts']} bank conflicts")
        read = found["bytes_loaded"]
        if problem["bytes"] and read != problem["bytes"]:
            raise Wrong(f"{read} bytes loaded, expected {problem['bytes']}")


def check_gemm(emulated, problem: dict[str, np.ndarray]) -> None:
    for timing, schedule in SCHEDULES:
        c = np.zeros(problem["c"].shape, np.uint16)
        emulated.gemm_probe(
            problem["a"], problem["b"], c, 128, bool(problem["trans_a"]), bool(problem["trans_b"]),
            2, schedule, timing, 4,
        )  # fmt: skip
        if not np.array_equal(c, problem["c"]):
            raise Wrong(f"{np.sum(c != problem['c'])} elements of c differ")


def check_relay(emulated, problem: dict[str, np.ndarray]) -> None:
    source = problem["in"]
    for timing, schedule in SCHEDULES:
        for resident in (1, 3):
            h, out = ([np.zeros_like(source) for _ in range(2)] for _ in range(2))
            emulated.relay_probe(source, h, out, 4, schedule, timing, resident)
            if not all(np.array_equal(o, source) for o in out):
                raise Wrong("out differs from in")


CHECKS: dict[str, Callable] = {
    "sm80": lambda e, p: check_down_proj(e, p, 80),
    "sm90": lambda e, p: check_down_proj(e, p, 90),
    "group": check_down_proj_group,
    "forward": check_forward,
    "decode": check_decode,
    "passes": check_backward,
    "grid": check_backward,
    "parts": check_parts,
    "grad80": check_grad80,
    "forward_group": check_forward_group,
    "backward_group": check_backward_group,
    "gemm80": check_fused_gemm,
    "outputs80": check_forward_group,
    "sums80": check_backward_group,
    "gemm": check_gemm,
    "relay": check_relay,
}


def read_problems(path: str) -> dict[str, dict[str, np.ndarray]]:
    """Arrays named "problem/array"."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, array in np.load(path).items():
        problem, _, key = name.partition("/")
        found.setdefault(problem, {})[key] = array
    return found


def main(library: str, problems: str, kinds: list[str]) -> int:
    emulated = build.load(Path(library))
    for name, problem in read_problems(problems).items():
        kind = name.split("-")[0]
        if kind not in kinds:
            continue
        try:
            CHECKS[kind](emulated, problem)
        except (Wrong, RuntimeError) as error:
            print(f"{name}: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:] or list(CHECKS)))
