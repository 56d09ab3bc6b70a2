"""Benchmarks, run as modules: bench, bench.bench_kernels, bench.bench_overhead."""
