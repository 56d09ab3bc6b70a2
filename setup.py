"""Builds lora_kernels._C if torch and a C++ compiler are found, with its CUDA kernels if nvcc is.

LORA_KERNELS_BUILD    auto (default) | cuda | cpu | python: anything but auto must succeed
TORCH_CUDA_ARCH_LIST  default "8.0+PTX;9.0a"; a "+PTX" suffix embeds PTX for newer devices, and
                      9.0 is taken for 9.0a: Hopper's kernels need its own instructions
CUDA_HOME, MAX_JOBS   as in torch
NVCC_APPEND_FLAGS     nvcc's own: with -lineinfo a profiler shows source lines
"""

import os
import re
import runpy
import shlex
import shutil
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import setup

BUILD = os.environ.get("LORA_KERNELS_BUILD", "auto")
DEFAULT_ARCHS = "8.0+PTX;9.0a"
ARCHS = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
ARCHS = re.sub(r"\b9\.0(?!a)", "9.0a", ARCHS)  # as images set it for other extensions
TORCH_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # loads in any torch from 2.11 on
NVCC_FLAGS = [
    "-O3", "-std=c++17", "-Xptxas=-v,-warn-spills", "-Xcompiler=-fvisibility=hidden",
]  # fmt: skip
EXPORTS = "csrc/torch/exports.map"  # of the library: what Python looks up, and nothing else
# The same sources give the same bytes: a wheel's times come from here, not from the clock.
os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800")  # 1980, the first that zip knows


def cuda_home():
    """The first CUDA root that has both the compiler and its headers.

    nvcc on PATH can be a wrapper outside the toolkit, so a guess is checked; CUDA_HOME is taken at
    its word and never replaced by a guess.
    """
    nvcc = shutil.which("nvcc")
    guesses = [nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    guesses += sorted(glob("/usr/local/cuda-*"), reverse=True)
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for root in [given] if given else guesses:
        if (
            root
            and Path(root, "bin/nvcc").exists()
            and Path(root, "include/cuda_runtime.h").exists()
        ):
            return str(root)
    return None


def gencode(archs):
    flags = []
    for arch in archs.replace(",", ";").replace(" ", ";").split(";"):
        number, _, ptx = arch.partition("+")
        sm = number.replace(".", "")
        codes = f"[sm_{sm},compute_{sm}]" if ptx else f"sm_{sm}"
        flags.append(f"-gencode=arch=compute_{sm},code={codes}")
    return flags


def remove_stale_objects(headers):
    """Without CUDA in torch, BuildExtension tracks no header of a .cu file: do it here."""
    newest = max(map(os.path.getmtime, headers), default=0)
    for obj in glob("build/temp*/csrc/cuda/*.o"):
        if os.path.getmtime(obj) < newest:
            os.remove(obj)


def write_kernel_sources():
    """The folder of a header with the hash of the kernels' sources, for csrc/torch/cuda.cpp.

    A macro on the command line would compile every file again whenever one kernel changes.
    """
    digest = runpy.run_path("csrc/digest.py")["kernel_sources"](Path("csrc"))
    header = Path("build/generated/kernel_sources.h").resolve()
    text = f'#define LK_KERNEL_SOURCES "{digest}"\n'
    if not header.exists() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    return str(header.parent)


def extension():
    """(Extension, build command), or (None, what is missing)."""
    sys.path.append(sysconfig.get_path("purelib"))  # pip's isolated build hides the installed torch
    try:
        import torch
        from torch.utils import cpp_extension as cpp
    except ImportError:
        return None, "torch is not visible to the build"
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(shlex.split(compiler)[-1]):
        return None, f"no C++ compiler ({compiler})"
    home = cuda_home() if BUILD != "cpu" else None
    if BUILD == "cuda" and not home:
        return None, "no CUDA toolkit (set CUDA_HOME)"
    if BUILD == "auto" and not home:
        print("lora_kernels: no CUDA toolkit: building the CPU kernels only", file=sys.stderr)

    cpp.CUDA_HOME = (
        home  # a CPU-only torch leaves it None, though our kernels need no torch CUDA header
    )
    headers = [
        h for ending in ("h", "inl", "cuh") for h in glob(f"csrc/**/*.{ending}", recursive=True)
    ]
    if torch.version.cuda is None:
        remove_stale_objects(headers)

    cpu = [*glob("csrc/torch/cpu*.cpp"), *glob("csrc/cpu/*.cpp")]
    sources = ["csrc/torch/module.cpp", *sorted(cpu)]
    options = {}
    if home:
        defines = [("LK_SM90A", "1")] if "9.0a" in ARCHS else []
        cuda = [*glob("csrc/cuda/*.cpp"), *glob("csrc/cuda/*.cu")]
        sources += sorted([*glob("csrc/torch/cuda*.cpp"), *cuda])
        options = dict(
            include_dirs=[f"{home}/include", write_kernel_sources()],
            library_dirs=[f"{home}/lib64"],
            libraries=["cudart_static", "rt", "dl", "pthread"],
            define_macros=defines,
        )
    # No path of the machine that builds reaches the library: __FILE__ is in torch's messages.
    site = Path(torch.__file__).parents[1]
    maps = [f"-ffile-prefix-map={folder}/=" for folder in (Path.cwd(), site)]
    ext = cpp.CppExtension(
        "lora_kernels._C",
        sources,
        py_limited_api=True,
        depends=[*headers, EXPORTS],
        extra_compile_args=dict(
            cxx=["-O3", "-std=c++17", "-fvisibility=hidden", "-g0", TORCH_ABI, *maps],
            # -objtemp names nvcc's intermediate files after the object, not after the process.
            nvcc=["-objtemp", *NVCC_FLAGS, *gencode(ARCHS), *(f"-Xcompiler={m}" for m in maps)],
        ),
        # libtorch.so pulls in libtorch_cuda.so where there is one: it resolves the weak stream
        # symbol
        extra_link_args=[
            "-Wl,--no-as-needed,-ltorch,--as-needed",
            "-Wl,--exclude-libs,ALL",
            f"-Wl,--version-script={EXPORTS}",
        ],
        **options,
    )  # fmt: skip
    return ext, cpp.BuildExtension


if BUILD not in ("auto", "cuda", "cpu", "python"):
    raise SystemExit(f"LORA_KERNELS_BUILD={BUILD}: expected auto, cuda, cpu or python")
ext, command = (None, "LORA_KERNELS_BUILD=python") if BUILD == "python" else extension()
if ext:
    setup(
        ext_modules=[ext],
        cmdclass={"build_ext": command},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
elif BUILD in ("auto", "python"):
    print(f"lora_kernels: {command}: installing the PyTorch backends only", file=sys.stderr)
    setup()
else:
    raise SystemExit(f"LORA_KERNELS_BUILD={BUILD}: {command}")
