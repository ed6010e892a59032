"""Commands that look at a log file or at pictures: report, watch, compare."""

from __future__ import annotations

import json
from pathlib import Path

import click

FILE = click.argument("file", default="taylor_patch.jsonl", type=click.Path(path_type=Path))


@click.command()
@FILE
@click.option("--html", type=click.Path(path_type=Path), help="Write the report here (one file, nothing loaded from elsewhere).")
@click.option("--png", type=click.Path(path_type=Path), help="Write the newest run as a picture here.")
def report(file: Path, html: Path | None, png: Path | None) -> None:
    """Draw what a log FILE holds: error, backend and time by step and block, logits, reasons for exact calls, settings.

    FILE is what log_file in taylor_patch.toml names. Without --html and --png the report is written to taylor_patch_report.html.
    """
    from taylor_patch.cli import needs
    from taylor_patch.report import page, runs

    if png is not None:
        needs.packages("--png", "report", "matplotlib")
    found = runs.load(file)
    if html is None and png is None:
        html = Path("taylor_patch_report.html")
    if html is not None:
        html.write_text(page.render(found, file.name), encoding="utf-8")
        click.echo(f"Wrote {html}.")
    if png is not None:
        from taylor_patch.report.picture import draw

        draw(found[-1], png)
        click.echo(f"Wrote {png}.")


@click.command()
@FILE
@click.option("--seconds", default=1.0, show_default=True, help="How often to look.")
@click.option("--once", is_flag=True, help="Show the newest run and stop.")
def watch(file: Path, seconds: float, once: bool) -> None:
    """Show the run in progress as a live table, from the log FILE. Ctrl-C ends it."""
    from taylor_patch.report.watch import watch as show

    show(file, seconds, once)


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--difference", type=click.Path(path_type=Path), help="Write the difference of the two here, four times as strong.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(first: Path, second: Path, difference: Path | None, as_json: bool) -> None:
    """Compare two pictures of one size: PSNR in dB (higher is closer; 40 is hard to see) and SSIM (1 is equal)."""
    from taylor_patch.report.compare import compare as measure

    found = measure(first, second, difference)
    click.echo(json.dumps({name: value if value != float("inf") else None for name, value in found.items()}) if as_json else
               f"PSNR {found['psnr_db']:.2f} dB, SSIM {found['ssim']:.4f}")
