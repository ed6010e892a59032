"""The tables of docs/compatibility.md, from result files:

    python -m pytest tests/comfyui/test_families.py --junitxml=FILE     # with COMFYUI_PATH and COMFYUI_PYTHON
    python -m benchmarks.compatibility FILE                             # keeps the results, writes the page
    python -m benchmarks.compatibility                                  # writes the page again

Kept are results/compatibility.jsonl (replaced for the versions that FILE has) and, read only, what benchmarks/comfyui.py measured on a GPU
(results/comfyui-*.jsonl).
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
KEPT = record.RESULTS / "compatibility.jsonl"
BEGIN, END = "<!-- made by benchmarks/compatibility.py from here -->", "<!-- to here -->"

Row = dict[str, Any]


def outcomes(junit: Path) -> list[Row]:
    """One row per version and case of test_families.py; raises SystemExit where the file has none."""
    rows: dict[tuple[str, str], Row] = {}
    for test in ET.parse(junit).getroot().iter("testcase"):
        told = {entry.get("name"): entry.get("value") for entry in test.iter("property")}
        if "case" not in told:
            continue
        key = (str(told["comfyui"]), str(told["case"]))
        row = rows.setdefault(key, {"comfyui": key[0], "case": key[1], "failed": [], "skipped": None,
                                    **json.loads(told.get("versions") or "{}")})
        if test.find("failure") is not None or test.find("error") is not None:
            row["failed"].append(str(test.get("name")).partition("[")[0])
        if (skipped := test.find("skipped")) is not None:
            row["skipped"] = skipped.get("message")
        if "calls" in told:
            row["evaluations"], row["near_far"], row["exact"] = json.loads(str(told["calls"]))
    if not rows:
        raise SystemExit(f"{junit} has no results of tests/comfyui/test_families.py")
    return list(rows.values())


def load(path: Path) -> list[Row]:
    """Rows of a result file; none where there is no such file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def keep(rows: Sequence[Row]) -> None:
    """Put rows in the place of those of the same versions."""
    fresh, environment = {row["comfyui"] for row in rows}, record.environment()
    kept = [row for row in load(KEPT) if row["comfyui"] not in fresh] + [{**environment, **row} for row in rows]
    KEPT.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")


def by_version(version: str) -> tuple[int, ...]:
    """Key to sort versions by."""
    return tuple(int(part) for part in version.split("."))


def cell(row: Row | None) -> str:
    """What a case came to."""
    if row is None:
        return "not run"
    if row["failed"]:
        return "failed: " + ", ".join(row["failed"])
    if row["skipped"]:
        return "no such model"
    if "near_far" not in row:
        return "passed"
    exact = sum(row["exact"].values())
    return f"near_far {row['near_far']}" + (f", exact {exact}" if exact else "")


def families_table(rows: Sequence[Row]) -> Iterator[str]:
    """Cases by versions."""
    versions = sorted({row["comfyui"] for row in rows}, key=by_version)
    found = {(row["case"], row["comfyui"]): row for row in rows}
    yield f"| case | {' | '.join(versions)} | exact because |"
    yield "|---" * (len(versions) + 2) + "|"
    for case in dict.fromkeys(row["case"] for row in rows):
        here = [found.get((case, version)) for version in versions]
        reasons = dict.fromkeys(reason for row in here if row for reason in row.get("exact", {}))
        yield f"| {case} | {' | '.join(map(cell, here))} | {'; '.join(reasons)} |"


def gpu_table(rows: Sequence[Row]) -> Iterator[str]:
    """Seconds per step and the device's memory in use after one, one line per version, setting and model. All of a line is of one commit:
    the last that ran every variant, or else most of them."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    found: dict[tuple[str, str, str], dict[str, dict[str, Row]]] = {}
    for row in rows:
        found.setdefault((row["comfyui"], row["setting"], row["model"]), {}).setdefault(row["commit"], {})[row["variant"]] = row
    yield f"| ComfyUI | setting | model | {' | '.join(variants)} | commit |"
    yield "|---" * (len(variants) + 4) + "|"
    for (version, setting, model), runs in found.items():
        commit, run = max(reversed(runs.items()), key=lambda item: len(item[1]))
        yield f"| {version} | {setting} | {model} | {' | '.join(step(run.get(name)) for name in variants)} | {commit} |"


def step(row: Row | None) -> str:
    """Seconds of one step and memory, or what went wrong."""
    if row is None:
        return ""
    if "error" in row:
        return "failed: " + " ".join(row["error"].split())[:80].replace("|", "/")
    used = "" if row["device_used_mib"] is None else f", {row['device_used_mib'] / 1024:.1f} GiB"
    return f"{row['step_seconds']:.3f} s{used}" + ("" if row["finite"] else ", not finite")


def made(families: Sequence[Row], gpu: Iterable[tuple[str, Sequence[Row]]]) -> str:
    """The text between BEGIN and END."""
    lines: list[str] = []
    if families:
        machines = dict.fromkeys(f"Python {row['python']}, torch {row['torch']}, {row['gpu'] or 'CPU'}" for row in families)
        lines += [f"`benchmarks/results/{KEPT.name}` ({'; '.join(machines)}):", "", *families_table(families)]
    for name, rows in gpu:
        lines += ["", f"Seconds of a step and memory in use, models of true width with few blocks: `benchmarks/results/{name}` "
                  f"({rows[-1]['gpu']}, torch {rows[-1]['torch']}):", "", *gpu_table(rows)]
    return "\n".join(lines)


def page() -> str:
    """docs/compatibility.md with its tables as the result files have them."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    gpu = [(path.name, load(path)) for path in sorted(record.RESULTS.glob("comfyui-*.jsonl"))]
    return f"{before}{BEGIN}\n\n{made(load(KEPT), gpu)}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Keep the results of a test run, where one is given, and write the page."""
    for junit in sys.argv[1:]:
        keep(outcomes(Path(junit)))
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
