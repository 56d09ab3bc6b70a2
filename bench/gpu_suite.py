"""`bench/gpu_suite.sh OUT`: all that a GPU has to show about the kernels, in one command.

Builds the CUDA kernels, runs the GPU tests and every compute-sanitizer tool, times the kernels and
whole layers, counts DRAM bytes, and prints one line per stage. Each stage has a time limit and
what the one before it left of its, so a hang costs no other stage; what cannot run here is
`not run`, with the reason. The exit code is 1 if a stage failed or was killed. No network, no
privilege, no change of the GPU's settings.

OUT (new or empty) receives suite.json (the record), logs.tar.gz (with the tests' report and the
tables of decode), kernels.json, gemm.json, backward.json, group.json, layers.json and
selfcheck.json. `python -m bench.publish OUT` makes results of it.

Three more runs measure what has no room in these ten minutes, each into an OUT of its own, which
receives suite.json, logs.tar.gz and what is named here; publish puts each beside the others'.

  --sweep    the GEMM with LoRA of three models' layers by length and rank (sweep.json), steps
             beside PEFT's (steps.json), memory (memory.json), what the GEMMs wait for (the record)
  --model    a decoder layer (model.json) and a fine-tune (finetune.json) under PEFT
  --triton   the Triton kernels: tests, selfcheck-triton.json, and a tuning on trial

In a copy without .git, LORA_KERNELS_COMMIT names the commit, with the suffix -dirty if the copy
differs from it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import os
import signal
import sys
import tarfile
import tempfile
from pathlib import Path

from . import counters, evidence, profiles, provenance, stages, traffic
from .gpu_state import Monitor
from .provenance import BINARY, ROOT
from .stages import Failed, Finished, NotRun, Stage

SCHEMA = 1
WIDE = {"COLUMNS": "120"}  # rich takes a file for 80 columns wide and cuts the tables

_PROBE = """
import importlib.util, json, platform, torch
found = {"python": platform.python_version(), "torch": torch.__version__}
found["cuda"] = torch.version.cuda
used = "rich", "matplotlib", "pytest", "hypothesis", "numpy", "peft", "transformers"
found["modules"] = [name for name in used if importlib.util.find_spec(name)]
if importlib.util.find_spec("triton"):
    import importlib.metadata
    found["triton"] = importlib.metadata.version("triton")
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    found["device_name"] = properties.name
    found["capability"] = [properties.major, properties.minor]
    found["multiprocessors"] = properties.multi_processor_count
    found["memory_bytes"] = properties.total_memory
    found["uuid"] = str(properties.uuid)
    torch.ones(8, device="cuda").sum().item()
print(json.dumps(found))
"""

# ---- the stages ----------------------------------------------------------------------------------


class Suite:
    """One run: what the probe found, and the stages that depend on it."""

    def __init__(
        self, out: Path, logs: Path, use_carried: bool, limits: dict[str, float],
        profile: str = "cuda",
    ):  # fmt: skip
        self.out, self.logs, self.use_carried, self.limits = out, logs, use_carried, limits
        self.profile = profile
        self.facts: dict = {}
        self.monitor = Monitor()  # until the probe says which GPU torch uses

    def now(self) -> dict | None:
        return self.monitor.now()

    def sampling(self) -> contextlib.AbstractContextManager[dict]:
        return self.monitor.sampling()

    def stages(self) -> list[Stage]:
        first = [
            Stage("probe", self.limits["probe"], self._probe, self._probed),
            Stage(
                "build", self.limits["build"], self._build, self._built,
                {"LORA_KERNELS_BUILD": "cuda", "MAX_JOBS": str(os.cpu_count() or 1)},
            ),
        ]  # fmt: skip
        rest = {
            "cuda": self._of_cuda, "sweep": self._of_sweep, "model": self._of_model,
            "triton": self._of_triton,
        }  # fmt: skip
        return first + rest[self.profile]()

    def _of_cuda(self) -> list[Stage]:
        return [
            Stage("tests", self.limits["tests"], self._tests, self._tested, needs=("build",)),
            *map(self._sanitizer, profiles.SANITIZERS),
            self._timing("kernels", ["bench.bench_kernels"], evidence.kernels),
            self._timing("gemm", ["bench.bench_gemm"], evidence.gemm),
            self._timing("backward", ["bench.bench_backward"], evidence.gemm),
            self._timing("group", ["bench.bench_group", *profiles.BACKENDS], evidence.group),
            self._timing("decode", ["bench.bench_decode"], evidence.gemm, self.logs),
            self._timing(
                "layers", [*profiles.LAYERS, "--plot", str(self.logs / "layers.png")],
                evidence.layers,
            ),
            Stage(
                "dram", self.limits["dram"], self._dram,
                lambda finished: evidence.dram(finished, self.logs / "ncu.csv"), needs=("build",),
            ),
            self._timing("selfcheck", profiles.SELFCHECK, evidence.selfcheck),
        ]  # fmt: skip

    def _of_sweep(self) -> list[Stage]:
        steps = [*profiles.STEPS, "--plot", str(self.logs / "steps.png")]
        return [
            self._timing("sweep", profiles.SWEEP, evidence.gemm),
            self._timing("steps", steps, evidence.layers),
            self._timing("memory", profiles.MEMORY, evidence.memory),
            Stage(
                "counters", self.limits["counters"], self._counters,
                lambda finished: evidence.counters(finished, self.logs / "counters.csv"),
                needs=("build",),
            ),
        ]  # fmt: skip

    def _of_triton(self) -> list[Stage]:
        """They need no binary: a build that fails or cannot be leaves them as they are."""
        selfcheck = self.out / "selfcheck-triton.json"
        return [
            Stage(
                "triton", self.limits["triton"], self._triton_tests,
                lambda finished: evidence.tests(finished, self.logs / "triton"),
            ),
            Stage(
                "selfcheck-triton", self.limits["selfcheck-triton"],
                lambda: self._module(
                    *profiles.SELFCHECK_TRITON, "--device", "cuda", "--json", str(selfcheck)
                ),
                lambda finished: evidence.selfcheck(finished, selfcheck), WIDE, sampled=True,
            ),
            Stage(
                "tune-triton", self.limits["tune-triton"], lambda: self._module(*profiles.TUNE),
                environment=WIDE, sampled=True,
            ),
        ]  # fmt: skip

    def _of_model(self) -> list[Stage]:
        modules = ("peft", "transformers")
        return [
            self._timing("model", profiles.MODEL, evidence.model, modules=modules),
            self._timing("finetune", profiles.FINETUNE, evidence.finetune, modules=modules),
        ]

    def _triton_tests(self) -> list[str]:
        self._need_triton("pytest", "hypothesis", "numpy")
        return self._pytest("triton", "triton")

    def _module(self, *arguments: str) -> list[str]:
        """Of a stage that times Triton's kernels."""
        self._need_triton("rich", "matplotlib")
        return [sys.executable, "-m", *arguments]

    def _need_triton(self, *modules: str) -> None:
        self._need(*modules)
        if "triton" not in self.facts:
            raise NotRun(f"{sys.executable} has no module triton")

    def _need(self, *modules: str) -> None:
        """Raises NotRun without a GPU, or without the modules."""
        if "device_name" not in self.facts:
            raise NotRun("torch sees no CUDA device" if self.facts else "torch cannot be imported")
        missing = [name for name in modules if name not in self.facts["modules"]]
        if missing:
            raise NotRun(f"{sys.executable} has no module {', '.join(missing)}")

    def _need_binary(self, *modules: str) -> None:
        """Raises NotRun where what would run is not what the sources say."""
        self._need(*modules)
        if not self.use_carried and not provenance.is_current():
            raise NotRun(f"no {BINARY.relative_to(ROOT)} with CUDA kernels that is newer than csrc")

    def _probe(self) -> list[str]:
        return [sys.executable, "-c", _PROBE]

    def _probed(self, finished: Finished) -> dict:
        if finished.code != 0:
            if "ModuleNotFoundError" in finished.text():
                raise NotRun(finished.last_line())
            raise Failed(f"exit code {finished.code}: {finished.last_line()}")
        self.facts = json.loads(finished.text().splitlines()[-1])
        self._need()
        uuid = self.facts["uuid"]
        self.monitor = Monitor(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        self.facts["nvidia_smi"] = self.monitor.facts()
        headline = f"{self.facts['device_name']}, torch {self.facts['torch']}"
        if self.monitor.problem:
            headline += f" (no clocks: {self.monitor.problem})"
        return {"headline": headline}

    def _build(self) -> list[str]:
        self._need()
        if self.use_carried or provenance.is_current():
            why = "--use-carried" if self.use_carried else "it is newer than the sources"
            if not BINARY.exists():
                raise NotRun(f"{why}, but there is no {BINARY.relative_to(ROOT)}")
            raise NotRun(f"{BINARY.relative_to(ROOT)} is taken as it is: {why}")
        traffic.cuda_tool("nvcc")
        return [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]

    def _built(self, finished: Finished) -> dict:
        stages.exit_code(finished)
        if not provenance.is_current():
            raise Failed("it left no lora_kernels/_C.abi3.so with CUDA kernels")
        return {"headline": f"{BINARY.stat().st_size >> 10} KiB"}

    def _tests(self) -> list[str]:
        self._need_binary("pytest", "hypothesis", "numpy")
        return self._pytest("tests", "not triton")

    def _pytest(self, name: str, which: str) -> list[str]:
        return [sys.executable, "-m", "bench.gpu_tests", str(self.logs / name), "-k", which]

    def _tested(self, finished: Finished) -> dict:
        return evidence.tests(finished, self.logs / "tests")

    def _sanitizer(self, tool: str) -> Stage:
        def command() -> list[str]:
            self._need_binary()
            # API errors are not the kernels': torch asks the driver for what it may not have. A
            # failed launch of ours raises.
            return [
                traffic.cuda_tool("compute-sanitizer"), "--tool", tool, "--error-exitcode", "1",
                "--report-api-errors", "no", "--target-processes", "application-only",
                "--launch-timeout", "60", "--show-backtrace", "device",
                sys.executable, "-m", "bench.sanitize", *(["--run-only"] * (tool == "initcheck")),
            ]  # fmt: skip

        # Uncached, each tensor is an allocation of its own: the tool sees where it ends, and what
        # of it was never written.
        return Stage(
            tool, self.limits[tool], command, lambda finished: evidence.sanitizer(finished, tool),
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, needs=("build",),
        )  # fmt: skip

    def _timing(
        self, name: str, arguments: list[str], judge, folder: Path | None = None,
        modules: tuple[str, ...] = (),
    ) -> Stage:  # fmt: skip
        path = (folder or self.out) / f"{name}.json"

        def command() -> list[str]:
            self._need_binary("rich", "matplotlib", *modules)
            return [sys.executable, "-m", *arguments, "--device", "cuda", "--json", str(path)]

        return Stage(
            name, self.limits[name], command, lambda finished: judge(finished, path), WIDE,
            sampled=True, needs=("build",),
        )  # fmt: skip

    def _dram(self) -> list[str]:
        self._need_binary("rich", "matplotlib")
        return traffic.ncu_command(self.logs / "ncu.csv")

    def _counters(self) -> list[str]:
        self._need_binary("rich", "matplotlib")
        return counters.ncu_command(self.logs / "counters.csv")


# ---- the record ----------------------------------------------------------------------------------


def write(out: Path, logs: Path, head: dict, records: list[dict]) -> None:
    """suite.json and logs.tar.gz, each replaced at once: whenever we are killed, both are whole."""
    archive, record = out / "logs.tar.gz", out / "suite.json"
    with tarfile.open(logs.parent / "logs.tar.gz", "w:gz") as tar:
        tar.add(logs, arcname="logs", filter=_anonymous)
    for target, content in (
        (archive, (logs.parent / "logs.tar.gz").read_bytes()),
        (record, (json.dumps(head | {"stages": records}, indent=1) + "\n").encode()),
    ):
        temporary = target.with_suffix(".new")
        temporary.write_bytes(content)
        temporary.replace(target)


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def run(
    out: Path, names: list[str] | None = None, use_carried: bool = False,
    limits: dict[str, float] | None = None, profile: str = "cuda",
) -> list[dict]:  # fmt: skip
    """Runs the named stages (the probe always) and writes OUT; prints the table. The records."""
    out.mkdir(parents=True, exist_ok=True)
    head = {
        "schema": SCHEMA,
        "start": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **provenance.commit(),
        "sources_sha256": provenance.sources_hash(),
        "finished": False,
    }
    if profile != "cuda":
        head["profile"] = profile
    if profile == "triton":
        head["triton_sha256"] = provenance.triton_hash()
    with tempfile.TemporaryDirectory() as scratch:
        logs = Path(scratch) / "logs"
        logs.mkdir()
        suite = Suite(out, logs, use_carried, profiles.PROFILES[profile] | (limits or {}), profile)

        def report(records: list[dict]) -> None:
            last = records[-1]
            print(f"{last['name']}: {last['status']} ({last['seconds']:.1f} s)", flush=True)
            head.update(device=suite.facts, binary_sha256=provenance.binary_hash())
            write(out, logs, head, records)

        wanted = [s for s in suite.stages() if s.name == "probe" or not names or s.name in names]
        records = stages.run(wanted, logs, ROOT, suite, report)
        head["finished"] = True
        write(out, logs, head, records)
    print("\n" + stages.table(records), flush=True)
    return records


def _limit(known: dict[str, float], text: str) -> tuple[str, float]:
    name, _, seconds = text.partition("=")
    if name not in known or not seconds.isdecimal() or int(seconds) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected STAGE=SECONDS, such as build=300")
    return name, int(seconds)


def _stages(known: dict[str, float], text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown stage {', '.join(unknown)}; expected some of {', '.join(known)}"
        )
    return names


def _profile() -> argparse.ArgumentParser:
    """Of what the command line asks for: it says which stages there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which = parser.add_mutually_exclusive_group()
    for name, what in profiles.FLAGS.items():
        which.add_argument(f"--{name}", dest="profile", action="store_const", const=name, help=what)
    which.set_defaults(profile="cuda")
    return parser


def main() -> int:
    profile = _profile().parse_known_args()[0].profile
    known = profiles.PROFILES[profile]
    parser = argparse.ArgumentParser(
        prog="bench/gpu_suite.sh",
        parents=[_profile()],
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT")
    parser.add_argument(
        "--stages", type=functools.partial(_stages, known), metavar="NAME[,NAME]",
        help="only these",
    )  # fmt: skip
    parser.add_argument(
        "--use-carried", action="store_true",
        help="take lora_kernels/_C.abi3.so as it is, even if the sources are newer",
    )  # fmt: skip
    parser.add_argument(
        "--limit", type=functools.partial(_limit, known), action="append", default=[],
        metavar="STAGE=SECONDS", help="another time limit for a stage",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="show the stages and limits, and stop")
    args = parser.parse_args()
    if args.list:
        width = stages.width(known)
        for name, seconds in known.items():
            print(f"{name:<{width}}{seconds:>4} s")
        return 0
    if args.out is None:
        parser.error("expected OUT, a new or empty directory")
    out = args.out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        parser.error(f"argument OUT: {args.out} is not a new or empty directory")
    # A plain SIGTERM would leave the running stage behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    records = run(out, args.stages, args.use_carried, dict(args.limit), profile)
    return 0 if stages.succeeded(records) else 1


if __name__ == "__main__":
    sys.exit(main())
