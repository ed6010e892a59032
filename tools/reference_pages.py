"""Pages of docs/reference that are made from the code: `python -m tools.reference_pages`. A test holds them against it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from taylor_patch import config, plugins
from taylor_patch.cli import main

FOLDER = Path(__file__).parents[1] / "docs" / "reference"


def allowed(schema: dict[str, Any]) -> str:
    """What a key may hold, in words."""
    if "anyOf" in schema:
        return " or ".join(allowed(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f'`"{choice}"`' for choice in schema["enum"])
    if schema["type"] == "array":
        return "list of strings"
    return {"boolean": "`true` or `false`", "integer": "whole number", "number": "number", "string": "string"}[schema["type"]]


def options() -> str:
    """Every table of the configuration file with its keys."""
    schema = config.schema(plugins.load(found=()).option_types)["properties"]
    tables = {"taylor_patch": schema["taylor_patch"], "plugins": schema["plugins"]}
    tables |= {f"backends.{name}": table for name, table in schema["backends"]["properties"].items()}
    lines = ["# All options", "", "Made from the schema by `python -m tools.reference_pages`. [Configuration](../configuration.md) says what",
             "they mean; `taylor-patch config schema` prints the schema for editors, options of installed plugins included.", ""]
    for name, table in tables.items():
        if not table["properties"]:
            continue
        lines += [f"## `[{name}]`", "", "| key | default | allowed |", "|---|---|---|"]
        lines += [f"| `{key}` | `{json.dumps(value['default'])}` | {allowed(value)} |" for key, value in table["properties"].items()]
        lines.append("")
    conditions = ", ".join(f"`{name}`" for name in schema["rules"]["items"]["properties"]["when"]["properties"])
    lines += ["## `[[rules]]`", "", f"`when` (a table), `backend`, `quality`. `when` knows {conditions}.", ""]
    return "\n".join(lines)


def walk(command: click.Command, words: str, parent: click.Context | None = None) -> Iterator[tuple[str, str]]:
    """(words, help) of a command and all below it."""
    context = click.Context(command, parent=parent, info_name=words.split()[-1], max_content_width=100, terminal_width=100)
    yield words, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from walk(child, f"{words} {name}", context)


def commands() -> str:
    """Every command with its help."""
    lines = ["# Commands", "", "Made from the commands' own help by `python -m tools.reference_pages`.", ""]
    for words, text in walk(main, "taylor-patch"):
        lines += [f"## `{words}`", "", "```text", text.strip(), "```", ""]
    return "\n".join(lines)


PAGES = {"options.md": options, "commands.md": commands}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make(), encoding="utf-8")
