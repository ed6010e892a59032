"""Measurements behind docs/performance*.md and docs/accuracy.md. Run as `python -m benchmarks.NAME` in the repository."""
