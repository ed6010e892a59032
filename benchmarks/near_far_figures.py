"""Figures of docs/performance.md and docs/accuracy.md, from benchmarks/results/ alone: `python -m benchmarks.near_far_figures`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).with_name("results")
CASE = ("what", "provider", "n", "d", "options", "tail", "density", "target", "input")
"""Keys that tell cases apart."""
IMAGES = Path(__file__).parents[1] / "docs" / "images"


def rows(name: str) -> list[dict[str, Any]]:
    """A results file, of each case what was measured last."""
    last = {}
    for line in (RESULTS / name).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        last[json.dumps([row.get(key) for key in CASE])] = row
    return list(last.values())


def save(figure: Any, name: str) -> None:
    """Write docs/images/NAME.png."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(IMAGES / f"{name}.png", dpi=130)


NAMES = {"flash": "flash (torch)", "cudnn": "cuDNN SDPA", "sage": "sageattention 1.0.6", "int8_attention": "comfy-kitchen int8",
         "sol_attn": "comfy-kitchen sol_attn", "near_far": "near_far"}


def time_against_tokens() -> None:
    """Time against the number of tokens, for each provider."""
    figure, axes = plt.subplots(figsize=(7, 4.4))
    measured = [row for row in rows("attention-h200.jsonl") if "median_ms" in row and row["d"] == 128 and row["options"]["data"] == "normal"
                and "n_kv" not in row["options"]]
    for provider, density, style in (("flash", None, "C7--"), ("sage", None, "C4:"), ("int8_attention", None, "C4--"), ("cudnn", None, "C0-"),
                                     ("sol_attn", 0.35, "C2:"), ("sol_attn", 0.05, "C2-"), ("near_far", 0.2, "C1:"), ("near_far", 0.1, "C1--"),
                                     ("near_far", 0.05, "C1-")):
        points = sorted((row["n"], row["median_ms"]) for row in measured
                        if row["provider"] == provider and row["options"].get("density") == density and row["n"] != 119_056)
        label = NAMES[provider] + ("" if density is None else f", {density:.0%} exact")
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms a call", title=f"{measured[0]['gpu']}, bf16, 24 heads of 128")
    axes.set_xticks([4_608, 8_192, 16_896, 33_280, 66_048, 118_784], ["4.6k", "8.2k", "16.9k", "33k", "66k", "119k"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, "near-far-time")


def error_against_density() -> None:
    """Error on trained attention against the share of exact blocks, for each tail."""
    figure, axes = plt.subplots(figsize=(7, 4.4))
    measured = [row for row in rows("near_far_accuracy-h200.jsonl") if row["what"] == "heads" and "density" in row]
    tails = {"none": "no tail", "zeroth": "block means", "cumulant": "block means and covariances (near_far)"}
    for number, (tail, name) in enumerate(tails.items()):
        points = sorted((row["density"], row["rel_l2_median"], row["rel_l2_p90"]) for row in measured if row["tail"] == tail)
        density, median, p90 = zip(*points, strict=True)
        axes.plot(density, median, f"C{number}-o", markersize=4, label=f"{name}: median")
        axes.plot(density, p90, f"C{number}--o", markersize=4, label=f"{name}: 90th percentile")
    axes.set(yscale="log", xlabel="share of exact blocks", ylabel="relative L2 error of a head", title="trained model, 16,400 tokens, 40 heads")
    axes.set_xticks([0.05, 0.1, 0.2], ["5%", "10%", "20%"])
    axes.grid(alpha=0.3, which="both")
    axes.set_ylim(5e-3, 3)
    axes.legend(fontsize=8, loc="upper right", ncols=2)
    save(figure, "near-far-error")


def error_against_time() -> None:
    """Error and time on the same trained input, near_far with the peers."""
    figure, axes = plt.subplots(figsize=(7, 4.4))
    measured = [row for row in rows("attention-h200.jsonl") if row["options"]["data"] == "trained" and "quality" not in row["options"]]
    for number, provider in enumerate(("cudnn", "near_far", "sol_attn", "int8_attention", "sage")):
        points = sorted((row["median_ms"], row["rel_l2_p90"], row["options"].get("density")) for row in measured if row["provider"] == provider)
        axes.plot([time for time, _, _ in points], [error for _, error, _ in points], f"C{number}-o", markersize=4, label=NAMES[provider])
        for time, error, density in points:
            if density is not None:
                axes.annotate(f"{density:.0%}", (time, error), textcoords="offset points", xytext=(6, 3), fontsize=8)
    axes.set(yscale="log", xlim=(0, 9), xlabel="ms a call", ylabel="relative L2 error, 90th percentile of the heads",
             title="q, k, v of the trained model, 24 heads, 16,400 tokens")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    save(figure, "near-far-front")


if __name__ == "__main__":
    time_against_tokens()
    error_against_density()
    error_against_time()
