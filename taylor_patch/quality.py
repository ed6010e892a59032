"""What the words of `quality` stand for. Standard library only."""

QUALITIES = {"lossless": 0.02, "balanced": 0.03, "fast": 0.10}
"""Name -> relative L2 error aimed at per attention call."""
DEFAULT = "balanced"
