"""Pages of docs/reference that are made from the code: `python -m tools.reference_pages`. A test holds them against it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from taylor_patch import config, families, plugins
from taylor_patch.cli import main

FOLDER = Path(__file__).parents[1] / "docs" / "reference"


def allowed(schema: dict[str, Any]) -> str:
    """What a key may hold, in words: type or choices, and bounds."""
    if "anyOf" in schema:
        return " or ".join(allowed({**bounds(schema), **choice}) for choice in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in schema["enum"])
    if schema["type"] == "array":
        return "list of strings"
    if schema["type"] == "object":
        return "table of " + ", ".join(f"`{name}`" for name in schema["properties"])
    kind = {"boolean": "`true` or `false`", "integer": "whole number", "number": "number", "string": "string"}[schema["type"]]
    said = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "up to"}
    limits = " ".join(f"{said[name]} {bound}" for name, bound in bounds(schema).items())
    return f"{kind} {limits}" if limits and schema["type"] in ("integer", "number") else kind


def bounds(schema: dict[str, Any]) -> dict[str, float]:
    """The bounds of a key's numbers."""
    return {name: schema[name] for name in ("minimum", "exclusiveMinimum", "maximum") if name in schema}


def options() -> str:
    """Every table of the configuration file with its keys; backends with the same options share a table."""
    schema = config.schema(plugins.load(found=()).option_types)["properties"]
    tables = {"`[taylor_patch]`": schema["taylor_patch"], "`[plugins]`": schema["plugins"]}
    for name, table in schema["backends"]["properties"].items():
        alike = next((title for title, other in tables.items() if other == table), None)
        tables[f"`[backends.{name}]`" if alike is None else f"{alike}, `[backends.{name}]`"] = table
        tables.pop(alike or "", None)
    lines = ["# All options", "",
             "Made from the schema by `python -m tools.reference_pages`; `taylor-patch config schema` prints the schema for editors,",
             "options of installed plugins included. [Configuration](../configuration.md) says how the file is read, and more of",
             "`[taylor_patch]`; [tuning](../tuning.md) says what helps where.", ""]
    for title, table in tables.items():
        if not table["properties"]:
            continue
        lines += [f"## {title}", "", "| key | default | allowed | meaning |", "|---|---|---|---|"]
        lines += [f"| `{key}` | `{json.dumps(value['default'])}` | {allowed(value)} | {value['description']} |"
                  for key, value in table["properties"].items()]
        lines.append("")
    lines += ["## `[[rules]]`", "", "First match wins; what a rule leaves out comes from `[taylor_patch]`.", "", "| key | allowed | meaning |",
              "|---|---|---|"]
    lines += [f"| `{key}` | {allowed(value)} | {value['description']} |" for key, value in schema["rules"]["items"]["properties"].items()]
    lines.append("")
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


def families_page() -> str:
    """The table of families."""
    where = {"apart": "cross-attention only", "before": "before the image", "after": "after the image"}
    lines = ["# Model families", "", "Made from `taylor_patch/families.py` by `python -m tools.reference_pages`. What was run:",
             "[Compatibility](../compatibility.md).", "",
             "| family | text tokens | patch | block index | masks | exact besides cross-attention to few keys |", "|---|---|---|---|---|---|"]
    lines += [f"| {row.title} | {where[row.text]} | {row.patch} | {row.keys} | {row.masks} | {row.exact} |" for row in families.FAMILIES]
    return "\n".join([*lines, "", FAMILIES_NOTE])


FAMILIES_NOTE = """\
The patch size is read from the model. The image's place follows from the call (`img_slice`, `grid_sizes`, `activations_shape`) or from
the latent and this table: whatever is left of the sequence is text. HunyuanVideo of ComfyUI before 2026-02 has the text after the image;
its blocks say so. Z-Image pads text and image to a multiple of 32 tokens each.

ComfyUI up to 0.3.72 gives no block index outside UNets; there, too, calls are counted.

The latent is that of the model evaluation, so regional prompts, context windows and a batch that changes have their own grid. A
ControlNet is not part of an evaluation: its calls are exact. A family that is not listed uses `near_far` where its calls have as many
tokens as the latent, or say where the image lies, and is exact elsewhere.
"""

PAGES = {"options.md": options, "commands.md": commands, "families.md": families_page}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make(), encoding="utf-8")
