"""`taylor-patch bench`."""

from __future__ import annotations

import dataclasses
import json
import re

import click


def _size(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", value)
    if not match:
        raise click.BadParameter(f'"{value}" is not like 2048x2048 (width x height in pixels)')
    return int(match[1]), int(match[2])


@click.command()
@click.option("--model", default="flux", show_default=True, type=click.Choice(["flux", "wan", "hunyuan", "sdxl"]), help="Whose shapes to time.")
@click.option("--size", callback=_size, help="Width x height in pixels, for example 2048x2048. [default: the model's usual size]")
@click.option("--frames", type=click.IntRange(min=1), help="Frames of a video. [default: the model's usual length]")
@click.option("--backend", "names", multiple=True, help="Only this backend beside exact attention; may be repeated.")
@click.option("--quality", help='"lossless", "balanced", "fast" or a relative L2 error. [default: the configuration\'s]')
@click.option("--device", "device_name", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--seconds", default=1.0, show_default=True, help="Time to spend on each figure; a call is never cut short.")
@click.option("--calibrate", is_flag=True, help="Find from how many tokens each backend is faster here, and keep it for backend = \"auto\".")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(model: str, size: tuple[int, int] | None, frames: int | None, names: tuple[str, ...], quality: str | None, device_name: str,
          seconds: float, calibrate: bool, as_json: bool) -> None:
    """Time the backends on this machine at a model's shape, with their error on the q, k, v of a small trained model.

    Close ComfyUI first: a GPU that works on something else times wrongly.
    """
    import torch

    from taylor_patch.cli import needs

    needs.packages("bench", "demo", "safetensors")
    device = needs.device(device_name)
    from taylor_patch import calibration
    from taylor_patch import config as configuration
    from taylor_patch.bench import measure, shapes
    from taylor_patch.engine import engine
    from taylor_patch.errors import TaylorPatchError
    from taylor_patch.router import CROSSOVER_HEADS

    router = engine().router
    if unknown := [name for name in names if name not in router.backends]:
        raise TaylorPatchError(router.backends.unknown(unknown[0], sorted(router.backends)))
    backends = [backend for backend in router.by_priority if not names or backend.name in names]
    family = shapes.FAMILIES[model]
    target = configuration.quality_value(_number(quality) if quality is not None else engine().config.settings.quality)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if calibrate:
        if size is not None or frames is not None:
            raise click.UsageError("--calibrate times lengths of its own. Leave out --size and --frames.")
        click.echo("looking at the errors on the trained model's calls", err=True)
        found = measure.crossovers(backends, CROSSOVER_HEADS, family.head_dim, device, dtype, target, seconds,
                                   lambda tokens: click.echo(f"timed {tokens} tokens", err=True))
        file = calibration.store(device, found)
        if as_json:
            click.echo(json.dumps({"device": calibration.device_name(device), "crossovers": found}, indent=2))
        for name, tokens in () if as_json else found.items():
            click.echo(f"{name}: " + (f"faster from {tokens} tokens" if tokens else
                                      "not faster at any length timed, or not accurate enough, or it cannot run here"))
        click.echo(f'Kept in {file}; backend = "auto" uses it from the next start.', err=True)
        return
    grid = shapes.grid(family, size or family.default_size, frames or family.default_frames)
    rows = measure.compare(backends, measure.shaped_call(family.heads, family.head_dim, grid, device, dtype, target), seconds,
                           progress=lambda name: click.echo(f"timing {name} at {grid.tokens + grid.start:,} tokens", err=True),
                           all_of_them=bool(names))
    if as_json:
        click.echo(json.dumps({"model": model, "tokens": grid.tokens + grid.start, "device": calibration.device_name(device),
                               "rows": [dataclasses.asdict(row) for row in rows]}, indent=2))
        return
    _print(rows, f"{model}: {grid.tokens + grid.start} tokens, {family.heads} heads of {family.head_dim}, {calibration.device_name(device)}",
           target)


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _print(rows: list, title: str, target: float) -> None:  # type: ignore[type-arg]
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in ("backend", "ms", "ratio", "error median", "error p90", "MiB", "note"):
        table.add_column(name, no_wrap=name == "backend")

    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for row in rows:
        table.add_row(row.backend, text(row.milliseconds, ".2f"), text(row.ratio, ".2f"), text(row.error_median, ".4f"),
                      text(row.error_p90, ".4f"), text(row.peak_mib, ".0f"), row.note)
    Console().print(table)
    good = [row for row in rows[1:] if row.ratio and row.ratio > 1 and row.error_median is not None and row.error_median <= target]
    best = max(good, key=lambda row: row.ratio, default=None)
    click.echo(f"At this size {best.backend} is {best.ratio:.1f} times as fast as exact attention, within the error of {target:g}." if best
               else f"At this size no backend is faster than exact attention within the error of {target:g}.")
