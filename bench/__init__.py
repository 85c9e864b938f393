"""Benchmarks: our engines against plain loops, other packages and unrolling, in time and memory.

`python -m bench.run` (or `make bench`) measures everything interleaved in one process and writes
`bench/results/<device>.csv`, the plots and the README's table; the `bench_*.py` files show the same workloads
through pytest-benchmark.
"""
