"""The pictures of docs/live-control.md: `python -m tools.page_pictures COMFYUI PYTHON`.

COMFYUI: a checkout; PYTHON: an interpreter that ComfyUI runs in and that has taylor_patch. The demo's model runs there on the CPU.
"""

from __future__ import annotations

import asyncio
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from taylor_patch.demo.comfyui.picture import NODES, workflow
from taylor_patch.demo.comfyui.server import Server
from tools import browser

FOLDER = Path(__file__).parents[1] / "docs" / "images"
LOOKS = {"live-control.png": {"width": 800}, "live-control-dark-phone.png": {"width": 390, "dark": True}}


async def visit(server: Server) -> None:
    """Choose near_far, compare a run, take the pictures, and print its line."""
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
        for name, look in LOOKS.items():
            await page.open(address, **look)  # type: ignore[arg-type]
            await page.until("document.querySelectorAll('#report svg').length === 4")
            picture = Image.open(io.BytesIO(await page.picture())).convert("RGB").quantize(128)
            picture.save(FOLDER / name, optimize=True)
        print(await page.value("document.querySelector('#line').textContent"))


def main() -> None:
    """See the module."""
    comfyui, python = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="taylor-page-") as folder:
        settings = Path(folder) / "taylor_patch.toml"
        settings.write_text("[taylor_patch]\n")
        with Server(Path(comfyui), Path(folder) / "server", python, nodes=[NODES],
                    env={"TAYLOR_PATCH": "1", "TAYLOR_PATCH_CONFIG": str(settings), "OMP_NUM_THREADS": "1"}) as server:
            asyncio.run(visit(server))


if __name__ == "__main__":
    main()
