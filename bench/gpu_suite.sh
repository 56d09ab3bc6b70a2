#!/usr/bin/env bash
# Builds, tests, sanitizes and measures the CUDA kernels: `bench/gpu_suite.sh OUT`, see gpu_suite.py.
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m bench.gpu_suite "$@"
