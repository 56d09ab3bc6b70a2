"""pytest in forks of one process that has imported torch: a planted bug costs no import."""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ELSEWHERE = 99  # no exit status of pytest
TESTS = Path(__file__).parent
OPTIONS = (
    "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", "-p",
    "no:unraisableexception",
)  # fmt: skip
LIBRARIES = (  # torch's parts too: autograd and opcheck import theirs when they are first used
    "triton_interpreter", "hypothesis.strategies", "numpy", "pytest", "torch", "torch._dynamo",
    "torch.fx.experimental.symbolic_shapes", "torch.testing._internal.optests",
    "torch.utils.cpp_extension", "torch.utils.flop_counter",
)  # fmt: skip


class Forks:
    """The process that forks, from the side of those who ask."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", "import forked_pytest; forked_pytest.serve()"]
        self._process = subprocess.Popen(
            command, cwd=TESTS, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},  # a fork cannot use a GPU
        )  # fmt: skip

    def run(self, tree: Path, arguments: list[str], seconds: int) -> tuple[int, str]:
        """(status, what it printed) of pytest with the `lora_kernels` of a tree.

        The status is pytest's; -N for signal N, SIGALRM when the time is over; ELSEWHERE if another
        `lora_kernels` was imported.
        """
        request = {"tree": str(tree), "arguments": arguments, "seconds": seconds}
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline()), (tree / "output.txt").read_text()

    def close(self) -> None:
        self._process.communicate()


def serve() -> None:
    """Answers requests, a line each; imports nothing that imports lora_kernels."""
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # else each fork writes to all of it
    for line in sys.stdin:
        print(_answer(json.loads(line)), flush=True)


def _answer(request: dict) -> int:
    if any("test_peft" in argument for argument in request["arguments"]):
        importlib.import_module("peft.tuners.lora")
    child = os.fork()
    if child == 0:
        _run(request)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run(request: dict) -> None:
    """In the child, which does not return."""
    import pytest

    signal.alarm(request["seconds"])  # outlives neither the limit nor a server that was killed
    tree = request["tree"]
    output = os.open(f"{tree}/output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.path.insert(0, tree)
    os.chdir(tree)
    code = int(pytest.main([*OPTIONS, *request["arguments"]]))
    loaded = getattr(sys.modules.get("lora_kernels"), "__file__", None) or ""
    sys.stdout.flush()
    os._exit(code if loaded.startswith(tree) else ELSEWHERE)
