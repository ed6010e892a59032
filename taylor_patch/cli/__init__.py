"""The `taylor-patch` command. What a command needs is imported when it runs, so that --help is quick."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from taylor_patch.cli import benchmark, place, reports

if TYPE_CHECKING:
    from taylor_patch.plugins import Registry


class Group(click.Group):
    """Errors of ours, and files that cannot be read or written, end a command with one line and status 1, not with a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """See click.Group."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            from taylor_patch.errors import TaylorPatchError

            if ctx.invoked_subcommand == "run":  # errors of the script are its own
                raise
            if isinstance(error, TaylorPatchError):
                raise click.ClickException(str(error)) from error
            if isinstance(error, OSError) and error.filename:
                raise click.ClickException(f"{error.filename}: {error.strerror}") from error
            raise


@click.group(cls=Group)
@click.version_option(package_name="taylor-patch")
def main() -> None:
    """Faster attention for big images and long videos in ComfyUI.

    Set TAYLOR_PATCH=1 and start ComfyUI as always; `taylor-patch doctor` tells whether it is on.
    """


for command in (benchmark.bench, reports.report, reports.watch, reports.compare):
    main.add_command(command)


def _even(context: click.Context, parameter: click.Parameter, value: int) -> int:
    if value % 2:
        raise click.BadParameter(f"{value} is odd; the model's patches are 2 x 2 pixels. Take {value - 1} or {value + 1}.")
    return value


@main.command()
@click.option("--size", default=128, show_default=True, callback=_even, type=click.IntRange(min=16),
              help="Side of the picture in pixels, an even number.")
@click.option("--steps", default=16, show_default=True, type=click.IntRange(min=1), help="Sampling steps.")
@click.option("--picture", default=17, show_default=True, type=click.IntRange(0, 20), help="Which of the 21 trained pictures (0 to 20).")
@click.option("--seed", default=0, show_default=True, help="Seed of the starting noise.")
@click.option("--out", default="taylor-demo", show_default=True, help="Folder for comparison.png and demo.json.")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--comfyui", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="Make the picture in this ComfyUI (headless, on the CPU), with taylor_patch off and on.")
@click.option("--comfyui-python", default=sys.executable, show_default="this one", help="The interpreter that ComfyUI runs in.")
@click.option("--json", "as_json", is_flag=True, help="Print what demo.json holds.")
def demo(size: int, steps: int, picture: int, seed: int, out: str, device: str, comfyui: Path | None, comfyui_python: str,
         as_json: bool) -> None:
    """Make one small picture with exact attention, near_far and global Taylor, and compare them."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from taylor_patch.cli import needs

    needs.packages("demo", "demo", "safetensors", "PIL")
    needs.device(device)
    from taylor_patch.demo.host import ROWS, run_demo
    from taylor_patch.run import counted

    with Progress(console=Console(stderr=True)) as bar:
        tasks = {name: bar.add_task(name, total=steps) for name in ROWS}

        def progress(name: str, done: int, _: int) -> None:
            bar.update(tasks[name], completed=done)

        if comfyui is None:
            result = run_demo(size, steps, picture, seed, out, device, progress)
        else:
            from taylor_patch.demo.comfyui.picture import run_in_comfyui

            result = run_in_comfyui(comfyui, comfyui_python, size, steps, picture, seed, out, progress)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    table = Table(title=f"{result['environment']['tokens']} tokens, {steps} steps, {result['environment']['device']}")
    table.add_column("backend", no_wrap=True)
    for title in ("s/step", "ratio", "PSNR dB", "rel L2 median", "rel L2 p90"):
        table.add_column(title)
    for row in result["rows"]:
        quality = "exact" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}"
        table.add_row(row["backend"], f"{row['seconds_per_step']:.2f}", f"{row['speed_ratio']:.2f}", quality,
                      *("" if row[key] is None else f"{row[key]:.4f}" for key in ("rel_l2_median", "rel_l2_p90")))
    Console().print(table)
    for row in result["rows"]:
        click.echo(row["log"] if "log" in row else f"{row['backend']}: attention calls: {counted(row['calls'], row['fallbacks'])}")
    click.echo(f"Pictures: {Path(out) / 'comparison.png'}  Figures: {Path(out) / 'demo.json'}")


@main.command()
@place.options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(comfyui: Path | None, user_directory: Path | None, as_json: bool) -> None:
    """Is it on here, and if not, why not? Exit status 1 where something stops it.

    Run it with the interpreter that starts ComfyUI, in ComfyUI's folder or with --comfyui.
    """
    from taylor_patch.cli.checks import checks

    found = checks(place.place(comfyui, user_directory))
    if as_json:
        click.echo(json.dumps([{"state": state, "text": text} for state, text in found], indent=2))
    else:
        for state, text in found:
            click.echo(f"{state:8} {text}")
    if any(state == "problem" for state, _ in found):
        raise SystemExit(1)


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(command: tuple[str, ...]) -> None:
    """Run a Python script with taylor_patch on: `taylor-patch run -- python main.py` or `taylor-patch run main.py`.

    For interpreters that do not read start-up files.
    """
    from taylor_patch.cli.launch import prepared
    from taylor_patch.errors import TaylorPatchError

    try:
        start = prepared(command)
    except TaylorPatchError as error:
        raise click.ClickException(str(error)) from error
    start()


def _registry(where: place.Place | None = None) -> Registry:
    """Plugins as ComfyUI would load them from there; torch is not imported unless one of them does it."""
    from taylor_patch import plugins as plugin_loader

    return plugin_loader.load((where or place.place(None, None)).allowed_plugins())


@main.command()
@click.option("--check", is_flag=True, help="Import each backend and ask it whether it can run here; without it nothing is imported.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def backends(check: bool, as_json: bool) -> None:
    """List the attention backends, and why one cannot run here."""
    if check:
        from taylor_patch.cli.checks import backend_rows

        rows = backend_rows()
    else:
        declarations = sorted(_registry().backends.values(), key=lambda declaration: -declaration.priority)
        rows = [{"name": d.name, "summary": d.summary, "priority": d.priority, "reasons_against": list(d.missing())} for d in declarations]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        state = "; ".join(row["reasons_against"]) or ("can run here" if check else f"priority {row['priority']}")
        if not row["reasons_against"] and row.get("auto_from_tokens"):
            state += f", auto from {row['auto_from_tokens']:,} tokens"
        click.echo(f"{row['name']:14} {state}. {row['summary']}")
    if check:
        from taylor_patch.cli.checks import without_crossover

        if reason := without_crossover():
            click.echo(f"With TAYLOR_PATCH=1 every call is exact: {reason}.")
    else:
        click.echo("`taylor-patch backends --check` tells whether each can run here.")


@main.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def plugins(context: click.Context, as_json: bool) -> None:
    """List the plugins that were found, and what is wrong with one."""
    if context.invoked_subcommand:
        return
    import dataclasses

    found = _registry().plugins
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(plugin) for plugin in found], indent=2))
        return
    for plugin in found:
        click.echo(f"{plugin.name:20} {plugin.error or ', '.join(plugin.backends) or 'no backends'} ({plugin.origin})")
        for note in plugin.notes:
            click.echo(f"{'':20} {note}")
    if troubled := sum(bool(plugin.notes or (plugin.error and not plugin.disallowed)) for plugin in found):
        click.echo(f"{troubled} of {len(found)} have a problem. With TAYLOR_PATCH_STRICT=1 the first one is an error, with exit status 1.")


@plugins.command()
@click.argument("name")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to write it; taylor-patch-NAME in this folder unless given.")
def new(name: str, folder: Path | None) -> None:
    """Write a working plugin called NAME: a package with a backend, its test, README and pyproject.toml."""
    from taylor_patch.cli.skeleton import write

    made = write(name, folder)
    click.echo(f"Wrote {made}. Next: cd {made}; python -m pytest; python -m pip install --editable .; taylor-patch plugins")


@main.command()
@click.option("--clear", is_flag=True, help="Remove it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cache(clear: bool, as_json: bool) -> None:
    """Show what earlier runs have settled and `bench --calibrate` has found and kept on disk, or remove it."""
    from taylor_patch import cache as values
    from taylor_patch import calibration
    from taylor_patch import tensor_cache as tensors

    file, folder, crossovers = values.path(), tensors.folder(), calibration.path()
    kinds = values.kinds() + tensors.kinds() + Counter({"crossovers": 1} if crossovers.exists() else {})
    size = sum(x.stat().st_size for x in (file, crossovers) if x.exists()) + tensors.nbytes()
    if clear:
        try:
            values.clear()
            tensors.clear()
            calibration.clear()
        except OSError as error:
            raise click.ClickException(f"{error.filename or file} cannot be removed ({error}).") from error
    if as_json:
        click.echo(json.dumps({"path": str(file), "folder": str(folder), "bytes": size, "entries": kinds, "cleared": clear}, indent=2))
        return
    shown = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())) or "no entries"
    click.echo(f"{'Removed ' if clear else ''}{file}, {crossovers.name} beside it and {folder}: {shown}, {size / 1024:.1f} KiB")


@main.group()
def config() -> None:
    """Make, show, explain and check the configuration."""


def _option_types() -> dict[str, type]:
    return _registry().option_types


@config.command()
@click.argument("path", default="taylor_patch.toml", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite a file that is there.")
def init(path: Path, force: bool) -> None:
    """Write a configuration file with the defaults."""
    from taylor_patch import config as configuration

    if path.exists() and not force:
        raise click.ClickException(f"{path} is there already. Use --force to overwrite it.")
    path.write_text(configuration.as_toml(configuration.merge([], _option_types())))
    click.echo(f"Wrote {path}. ComfyUI reads it from the folder it is started in, or its user folder.")


@config.command()
@place.options
def show(comfyui: Path | None, user_directory: Path | None) -> None:
    """Print the configuration in force, as TOML, with the files that it comes from."""
    from taylor_patch import config as configuration

    where = place.place(comfyui, user_directory)
    registry = _registry(where)
    found = configuration.merge(where.layers(), registry.option_types, registry.why_absent)
    click.echo("".join(f"# {line}\n" for line in where.described()) + configuration.as_toml(found), nl=False)


@config.command()
@click.argument("key")
@place.options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(key: str, comfyui: Path | None, user_directory: Path | None, as_json: bool) -> None:
    """Show every place that sets KEY, for example taylor_patch.backend, and which one wins."""
    from taylor_patch import config as configuration

    where = place.place(comfyui, user_directory)
    registry = _registry(where)
    rows = configuration.explain(configuration.merge(where.layers(), registry.option_types, registry.why_absent), key)
    if as_json:
        click.echo(json.dumps([{"place": origin, "value": value, "wins": wins} for origin, value, wins in rows], indent=2))
        return
    for line in where.described():
        click.echo(line)
    for origin, value, wins in rows:
        click.echo(f"{'wins' if wins else '    '} {value!r:20} {origin}")


@config.command()
@click.argument("path", required=False, type=click.Path(path_type=Path))
@place.options
def check(path: Path | None, comfyui: Path | None, user_directory: Path | None) -> None:
    """Check PATH, or the configuration in force, with all profiles; exit status 1 with file:line:column where it is wrong."""
    from taylor_patch import config as configuration

    where = place.place(comfyui, user_directory)
    registry = _registry(where)
    layers = where.layers() if path is None else [configuration.file_layer(path)]
    found = configuration.check(layers, registry.option_types, registry.why_absent)
    for line in where.described() if path is None else [f"read: {path}"]:
        click.echo(line)
    for sentence in found.ignored:
        click.echo(f"note: {sentence}")
    click.echo("The configuration is valid.")


@config.command()
def schema() -> None:
    """Print the JSON Schema of the configuration file, for editors."""
    from taylor_patch import config as configuration

    click.echo(json.dumps(configuration.schema(_option_types()), indent=2))
