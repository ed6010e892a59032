"""The report as one HTML file: nothing is loaded from elsewhere; readable on a phone, in light and dark."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from taylor_patch.report import charts
from taylor_patch.report.runs import Run
from taylor_patch.telemetry import saved_text

STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1c1c1a; --soft: #6b6a65; --line: #dddcd6; --empty: #f0efeb; --unknown: #c4c3bb;
  --heat-least: 88%; --heat-step: -13%;
  --series-0: #3272b8; --series-1: #c2642c; --series-2: #3f8f5f; --series-3: #8a5fb0; --series-4: #a8852a; --series-5: #b04a6a; }
@media (prefers-color-scheme: dark) { :root { --paper: #171716; --ink: #ecebe6; --soft: #a3a29b; --line: #3a3936;
  --empty: #242422; --unknown: #54534e; --heat-least: 28%; --heat-step: 12%;
  --series-0: #6fa8e6; --series-1: #e2935f; --series-2: #6fbf8d; --series-3: #b596d8; --series-4: #d1b25c; --series-5: #de8aa5; } }
body { font: 16px/1.5 system-ui, sans-serif; background: var(--paper); color: var(--ink); max-width: 46rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .3rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .2rem; }
p { margin: .3rem 0; color: var(--soft); } svg { width: 100%; height: auto; display: block; }
.tick, .axis { font-size: 12px; fill: var(--soft); } .grid { stroke: var(--line); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .92rem; }
td, th { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
td.n { overflow-wrap: anywhere; text-align: right; font-variant-numeric: tabular-nums; }
@media (max-width: 34rem) { .tick, .axis { font-size: 21px; } }
.key b { font-weight: normal; white-space: nowrap; margin-right: .8rem; } .key b.long { white-space: normal; }
.key span { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem; border-radius: 2px; vertical-align: -1px; }
.key span.line { height: 2px; background: var(--ink); vertical-align: 4px; }
"""

ERROR_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Bounds of the heat map's colours: relative L2 error."""


def render(runs: list[Run], source: str) -> str:
    """HTML text of the report; the newest run comes first."""
    body = "".join(section(run) for run in reversed(runs))
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>taylor_patch report</title><style>{STYLE}</style></head><body><h1>taylor_patch report</h1>"
            f"<p>{len(runs)} sampling run{'s' if len(runs) > 1 else ''} of {escape(source)}</p>{body}</body></html>")


def section(run: Run) -> str:
    """The part of the report about one run. Its settings are left out where its closing line has none."""
    steps = [("?" if step["step"] is None else str(step["step"])) + ("*" if step.get("repeated") else "") for step in run.steps]
    seconds = run.summary.get("seconds")
    head = (f"<h2>{escape(run.model)}, {len(run.steps)} model evaluations"
            + (f" in {seconds:.1f} s" if seconds is not None else ", in progress") + "</h2>")
    quality = run.summary.get("quality") or "no call was sampled"
    outcome = run.summary.get("outcome", "")
    saved = saved_text(run.summary.get("saved_seconds"), run.summary.get("speed_up"))
    parts = [head, f"<p>{escape(', '.join(filter(None, (saved, quality, '' if outcome == 'finished' else outcome))))}</p>"]
    if any(step.get("repeated") for step in run.steps):
        parts.append("<p>* not used: the step was computed again, with exact attention for what was too far off</p>")
    if run.blocks:
        parts += ["<h3>Error of sampled calls</h3><p>relative L2 against exact attention</p>", _errors(run, steps),
                  "<h3>Backend of each block</h3>", _backends(run, steps), "<h3>Time in backends</h3>", _times(run, steps)]
    if run.figures("logit_p50"):
        parts += ["<h3>Logits by block</h3><p>1st to 99th percentile of scale * q.k, dot: median; all sampled steps</p>", _logits(run)]
    if run.fallbacks:
        parts += ["<h3>Calls that were exact, by reason</h3>", _table(run.fallbacks)]
    if "settings" in run.summary:
        settings = _flat(run.summary["settings"])
        parts += ["<h3>Settings that differ from the defaults</h3>", _table(settings) if settings else "<p>none</p>"]
    return "".join(parts)


def _answers(run: Run) -> dict[tuple[int, int], dict[str, Any]]:
    """(column, block) -> the call that a backend answered there; a sampled one where there are several."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for column, step in enumerate(run.steps):
        for block in step["blocks"]:
            if block["block"] is not None and (block["figures"] or (column, block["block"]) not in found):
                found[column, block["block"]] = block
    return found


def heat(error: float) -> str:
    """Colour of an error: the larger, the darker (light page) or brighter (dark page)."""
    level = sum(error > bound for bound in ERROR_STEPS)
    return f"hsl(205 80% calc(var(--heat-least) + {level} * var(--heat-step)))"


def _errors(run: Run, steps: list[Any]) -> str:
    answers = _answers(run)

    def fill(column: int, row: int) -> tuple[str, str] | None:
        block = answers.get((column, run.blocks[row]))
        if block is None:
            return None
        error = block["figures"].get("quality_raw")
        where = f"step {steps[column]}, block {run.blocks[row]}"
        return ("var(--unknown)", "not sampled") if error is None else (heat(error), f"{where}: {error:.3g}")

    bounds = (0.0, *ERROR_STEPS)
    key = "".join(_item(heat(bound + 1e-9), f"over {bound:g}") for bound in bounds) + _item("var(--unknown)", "not sampled") + EXACT
    return charts.grid(steps, run.blocks, fill, "step", "block", "error by step and block") + f'<p class="key">{key}</p>'


def _names(run: Run) -> list[str]:
    return sorted({block["backend"] for step in run.steps for block in step["blocks"]})


def _key(names: list[str]) -> str:
    return "".join(_item(f"var(--series-{n % charts.SERIES})", name) for n, name in enumerate(names))


def _item(colour: str, text: str) -> str:
    return f'<b><span style="background:{colour}"></span>{escape(text)}</b> '


EXACT = _item("var(--empty)", "exact")


def _backends(run: Run, steps: list[Any]) -> str:
    names, answers = _names(run), _answers(run)

    def fill(column: int, row: int) -> tuple[str, str] | None:
        block = answers.get((column, run.blocks[row]))
        if block is None:
            return None
        colour = f"var(--series-{names.index(block['backend']) % charts.SERIES})"
        return colour, f"step {steps[column]}, block {run.blocks[row]}: {block['backend']}"

    return (charts.grid(steps, run.blocks, fill, "step", "block", "backend by step and block")
            + f'<p class="key">{_key(names)}{EXACT}</p>')


def _times(run: Run, steps: list[Any]) -> str:
    names = _names(run)
    series = {name: [step["milliseconds"].get(name) or 0.0 for step in run.steps] for name in names}
    exact = run.exact_milliseconds()
    key = _key(names) + ('<b class="long"><span class="line"></span>exact attention for the same calls, estimated</b>' if any(exact) else "")
    return charts.bars(steps, series, exact, "step", "milliseconds", "time in backends by step") + f'<p class="key">{key}</p>'


def _logits(run: Run) -> str:
    by_block: dict[int, list[dict[str, Any]]] = {}
    for step in run.steps:
        for block in step["blocks"]:
            if block["block"] is not None and block["figures"].get("logit_p50") is not None:
                by_block.setdefault(block["block"], []).append(block["figures"])
    blocks = sorted(by_block)
    values = [(min(f["logit_p01"] for f in by_block[b]), sum(f["logit_p50"] for f in by_block[b]) / len(by_block[b]),
               max(f["logit_p99"] for f in by_block[b])) for b in blocks]
    return charts.ranges(blocks, values, "block", "logit", "logit percentiles by block")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value} if value != [] else {}
    return flat


def _table(rows: Mapping[str, Any]) -> str:
    cells = "".join(f'<tr><td>{escape(name)}</td><td class="n">{escape(str(value))}</td></tr>' for name, value in rows.items())
    return f'<div class="scroll"><table>{cells}</table></div>'
