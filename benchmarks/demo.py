"""The README's picture: the demo with its defaults, its figures recorded.

    python -m benchmarks.demo
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from benchmarks import record
from taylor_patch.demo.host import run_demo

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "demo.png"


def main() -> None:
    """Run the demo on the CPU; write docs/images/demo.png and a row for each backend."""
    with tempfile.TemporaryDirectory() as folder:
        result = run_demo(out=folder, device="cpu")
        PICTURE.parent.mkdir(exist_ok=True)
        shutil.copy(Path(folder) / "comparison.png", PICTURE)
    print(record.append("demo", [{**row, **{key: result["environment"][key] for key in ("device", "size", "steps", "tokens")}}
                                 for row in result["rows"]]))


if __name__ == "__main__":
    main()
