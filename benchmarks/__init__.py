"""Measurements. Each module runs by itself (`python -m benchmarks.NAME`) and appends JSON lines to benchmarks/results/."""
