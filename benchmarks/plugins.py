"""The backends that are installed, plugins' among them, as a user meets them: `python -m benchmarks.plugins --commit HASH [--case OPTIONS]`.

bench: the rows of `taylor-patch bench`. attention: each backend once through taylor_patch.attention, on random q, k, v of a smooth picture
(bf16 on a GPU, 2 heads of 128, 64 x 64 tokens), with its relative L2 error against exact attention in float32, or what it said.
Both run in a folder of their own, so that what is measured is what is installed and not the checkout. One JSON line per backend and
case is appended to FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import record

EACH = """
import json, torch, taylor_patch
from taylor_patch import engine
device = "cuda" if torch.cuda.is_available() else "cpu"
gen = torch.Generator().manual_seed(0)
def draw():
    field = torch.randn(2, 128, 8, 8, generator=gen)
    field = torch.nn.functional.interpolate(field, (64, 64), mode="bilinear").flatten(2).transpose(1, 2)[None]
    return (1.4 * field + 0.5 * torch.randn(1, 2, 4096, 128, generator=gen)).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
q, k, v = draw(), draw(), draw()
exact = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())
for name, backend in sorted(engine.engine().router.backends.items()):
    row = {"backend": name, "from": type(backend).__module__.split(".")[0]}
    try:
        out = taylor_patch.attention(q, k, v, backend=name, grid=(1, 64, 64)).float()
        row["rel_l2"] = round(float((out - exact).norm() / exact.norm()), 6)
    except taylor_patch.TaylorPatchError as error:
        row["refused"] = str(error)
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {error}"
    print(json.dumps(row))
"""


def installed(*words: str) -> str:
    """Output of a Python command that sees what is installed, or PYTHONPATH names, and not the current folder."""
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([sys.executable, *words], cwd=folder, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words[:3]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def rows(cases: list[list[str]]) -> Iterator[dict[str, Any]]:
    """cases: options of `taylor-patch bench`."""
    for line in installed("-c", EACH).splitlines():
        yield {"what": "attention", "tokens": 4096, **json.loads(line)}
    for case in cases:
        found = json.loads(installed("-m", "taylor_patch", "bench", "--json", *case))
        for row in found.pop("rows"):
            yield {"what": "bench", **found, **row}


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", default=[], help='options of taylor-patch bench, as one word: "--model wan --seconds 0.5"')
    parser.add_argument("--commit", required=True, help="what the installed packages were built from")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "plugins.jsonl")
    arguments = parser.parse_args()
    common = record.environment(arguments.commit)
    with arguments.out.open("a", encoding="utf-8") as file:
        for row in rows([case.split() for case in arguments.case or ["--model flux"]]):
            print(json.dumps(row), flush=True)
            file.write(json.dumps({**row, **common}) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
