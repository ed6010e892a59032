"""The newest run of a log file as one PNG (matplotlib, the extra `report`)."""

from __future__ import annotations

import math
from pathlib import Path

from taylor_patch.errors import TaylorPatchError
from taylor_patch.report.runs import Run


def draw(run: Run, path: Path) -> None:
    """Error by step and block, time by step, logits by block. Raises TaylorPatchError where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise TaylorPatchError("--png needs matplotlib: pip install taylor-patch[report]") from None
    figure, (errors, times, logits) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    figure.suptitle(f"{run.model}: {run.summary.get('quality') or 'no call was sampled'}")
    steps, blocks = range(len(run.steps)), run.blocks
    table = [[math.nan] * len(steps) for _ in blocks]
    by_block: dict[int, list[tuple[float, float, float]]] = {}
    for column, step in enumerate(run.steps):
        for block in step["blocks"]:
            if block["block"] is not None and block["figures"].get("quality_raw") is not None:
                figures = block["figures"]
                table[blocks.index(block["block"])][column] = figures["quality_raw"]
                by_block.setdefault(block["block"], []).append((figures["logit_p01"], figures["logit_p50"], figures["logit_p99"]))
    if by_block:
        image = errors.imshow(table, aspect="auto", origin="lower", cmap="viridis", interpolation="nearest",
                              extent=(-0.5, len(steps) - 0.5, -0.5, len(blocks) - 0.5))
        figure.colorbar(image, ax=errors, label="relative L2 error")
        names = sorted(by_block)
        low, high = ([pick(v[i] for v in by_block[b]) for b in names] for i, pick in ((0, min), (2, max)))
        logits.vlines(names, low, high, linewidth=4)
        logits.plot(names, [sum(v[1] for v in by_block[b]) / len(by_block[b]) for b in names], "o", color="black", markersize=3)
    base = [0.0] * len(steps)
    for backend in sorted({name for step in run.steps for name in step["milliseconds"]}):
        values = [step["milliseconds"].get(backend) or 0.0 for step in run.steps]
        times.bar(steps, values, bottom=base, label=backend)
        base = [a + b for a, b in zip(base, values, strict=True)]
    marks = [(column, exact) for column, exact in enumerate(run.exact_milliseconds()) if exact is not None]
    if marks:
        times.hlines([exact for _, exact in marks], [column - 0.5 for column, _ in marks], [column + 0.5 for column, _ in marks],
                     color="black", label="exact, estimated")
    for axes, x, y, title in ((errors, "step", "block", "Error of sampled calls"), (times, "step", "milliseconds", "Time in backends"),
                              (logits, "block", "logit", "1st to 99th percentile of scale * q.k")):
        axes.set(xlabel=x, ylabel=y, title=title)
    if times.containers:
        times.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
