"""The pictures of docs/live-control.md and docs/telemetry.md: `python -m tools.page_pictures COMFYUI PYTHON`.

COMFYUI: a checkout; PYTHON: an interpreter that ComfyUI runs in and that has taylor_patch. The demo's model runs there on the CPU.
"""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from taylor_patch.demo.comfyui.picture import NODES, workflow
from taylor_patch.demo.comfyui.server import Server
from tools import browser

FOLDER = Path(__file__).parents[1] / "docs" / "images"
PAGE = {"live-control.png": {"width": 800}, "live-control-dark-phone.png": {"width": 390, "dark": True}}
REPORT = {"report-light.png": {"width": 800}, "report-dark.png": {"width": 800, "dark": True}, "report-phone.png": {"width": 390}}
SIZE, STEPS, PICTURE = 128, 16, 17


async def take(page: browser.Browser, address: str, looks: dict[str, Any], ready: str) -> None:
    """Pictures of a page in each of the looks, once `ready` is true there."""
    for name, look in looks.items():
        await page.open(address, **look)
        await page.until(ready)
        picture = Image.open(io.BytesIO(await page.picture())).convert("RGB").quantize(128)
        picture.save(FOLDER / name, optimize=True)


async def visit(server: Server, log_file: Path) -> None:
    """Choose near_far, compare a run, take the pictures, and print its line; then the report of a longer run."""
    program = browser.find()
    if program is None:
        raise SystemExit(f"none of {', '.join(browser.NAMES)} is on this machine")
    address = f"http://127.0.0.1:{server.port}/taylor_patch"
    async with browser.Browser(program) as page:
        await page.open(address)
        await page.until("!document.querySelector('#backend').disabled")
        await page.choose("#backend", "near_far")
        await page.choose("#quality", "fast")
        await page.until("document.querySelector('#state').textContent.includes('has backend near_far, quality fast')")
        await page.click("#compare")
        await page.until("document.querySelector('#compare').getAttribute('aria-pressed') === 'true'")
        await asyncio.to_thread(server.run, workflow(64, 12, 17, 0))
        await take(page, address, PAGE, "document.querySelectorAll('#report svg').length === 4")
        print(await page.value("document.querySelector('#line').textContent"))
        await page.choose("#quality", "balanced")
        await page.until("document.querySelector('#state').textContent.includes('has backend near_far, quality balanced')")
        log_file.unlink()  # the report is to show one run
        await asyncio.to_thread(server.run, workflow(SIZE, STEPS, PICTURE, 0))
        html = log_file.with_suffix(".html")
        subprocess.run([sys.executable, "-m", "taylor_patch", "report", log_file, "--html", html], check=True)
        await take(page, html.as_uri(), REPORT, "document.querySelectorAll('svg').length > 0")


def main() -> None:
    """See the module."""
    comfyui, python = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="taylor-page-") as folder:
        settings = Path(folder) / "taylor_patch.toml"
        log_file = Path(folder) / "log.jsonl"
        settings.write_text(f'[taylor_patch]\nlog_file = "{log_file}"\n')
        with Server(Path(comfyui), Path(folder) / "server", python, nodes=[NODES],
                    env={"TAYLOR_PATCH": "1", "TAYLOR_PATCH_CONFIG": str(settings), "OMP_NUM_THREADS": "1"}) as server:
            asyncio.run(visit(server, log_file))


if __name__ == "__main__":
    main()
