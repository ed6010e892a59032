"""The page at /taylor_patch in a real, headless ComfyUI on the CPU, by plain requests and in headless Chromium."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.error
import urllib.request

import pytest
import torch

from .conftest import latent, our_lines, workflow

try:
    from tools import browser
except ImportError:
    browser = None


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "live.toml"
    path.write_text("[taylor_patch]\nmin_tokens = 64  # of a tiny model\n")
    return path


def ask(server, path="/taylor_patch/state", data=None, **headers):
    """(status, text) of a GET, or of a POST of `data` as JSON."""
    headers = {name.replace("_", "-"): value for name, value in headers.items()} | ({"Content-Type": "application/json"} if data else {})
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", json.dumps(data).encode() if data else None, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def summaries(server):
    return [line for line in our_lines(server) if line.startswith("taylor_patch: Flux:")]


def test_switches_by_request(start, patched_python, config):
    with start(patched_python, {"TAYLOR_PATCH": "1", "TAYLOR_PATCH_CONFIG": str(config)}) as server:
        assert ask(server, "/taylor_patch")[0] == ask(server, "/api/taylor_patch")[0] == 200
        exact = latent(server, workflow("flux"))
        status, answer = ask(server, data={"backend": "near_far", "quality": "fast", "compare_next": True})
        assert status == 200 and json.loads(answer)["settings"]["backend"]["value"] == "near_far"
        first, second = latent(server, workflow("flux")), latent(server, workflow("flux"))
        shown = json.loads(ask(server)[1])
        charts = ask(server, "/taylor_patch/report")[1]
        assert ask(server, data={"backend": "sdpa"})[0] == 200
        again = latent(server, workflow("flux"))
        wrong = ask(server, data={"quality": "fats"})
    assert torch.equal(first, second) and not torch.equal(first, exact) and torch.equal(again, exact)
    one, two, three, four = summaries(server)
    assert not re.search(r"near_far \d", one) and "compared with exact attention" not in one + three + four and 'backend = "sdpa"' in four
    compared = re.search(r"near_far (\d+).* compared with exact attention: (\d+) calls, error \d", two)
    assert compared and compared[1] == compared[2] and f"taylor_patch: {shown['last_run']}" == three and charts.count("<svg") == 4
    assert config.read_text().startswith("[taylor_patch]\nmin_tokens = 64  # of a tiny model\n")
    assert wrong[0] == 400 and re.search(r'live\.toml:\d:1: taylor_patch\.quality: \\"fats\\" is not one of', wrong[1])


@pytest.mark.parametrize("flags", [(), ("--enable-cors-header",)], ids=["own-check", "cors"])
def test_another_origin_is_refused(start, patched_python, config, flags):
    server = start(patched_python, {"TAYLOR_PATCH": "1", "TAYLOR_PATCH_CONFIG": str(config)})
    server.command += flags
    with server:
        change = {"backend": "sdpa"}
        for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec_Fetch_Site": "cross-site"},
                        {"Host": "192.168.1.7", "Origin": "https://evil.example"}):
            assert ask(server, data=change, **headers)[0] == 403, headers
        assert "sdpa" not in config.read_text()
        assert ask(server, data=change, Origin=f"http://127.0.0.1:{server.port}", Sec_Fetch_Site="same-origin")[0] == 200
        assert ask(server, data={"backend": "near_far"})[0] == 200
    assert 'backend = "near_far"' in config.read_text()


def test_page_false_and_off(start, patched_python, config):
    config.write_text("[taylor_patch]\npage = false\n")
    for switch in ("1", "0"):
        with start(patched_python, {"TAYLOR_PATCH": switch, "TAYLOR_PATCH_CONFIG": str(config)}) as server:
            assert ask(server, "/taylor_patch")[0] == 404
            assert ask(server, data={"backend": "sdpa"})[0] in (404, 405)
    assert config.read_text() == "[taylor_patch]\npage = false\n"


@pytest.mark.skipif(browser is None or browser.find() is None, reason="no aiohttp, or no Chromium on this machine")
def test_in_chromium(start, patched_python, config):
    """Choose a backend, make a picture, and read what ran on the page and in the log."""
    async def visit(server):
        def make():
            return latent(server, workflow("flux"))

        async with browser.Browser(browser.find()) as page:
            await page.open(f"http://127.0.0.1:{server.port}/taylor_patch", width=390)
            await page.until("document.querySelector('#state').textContent.startsWith('On: the next sampling run has backend auto')")
            await page.choose("#backend", "near_far")
            await page.until("document.querySelector('#state').textContent.includes('has backend near_far, quality balanced')")
            await page.click("#compare")
            await page.until("document.querySelector('#compare').getAttribute('aria-pressed') === 'true'")
            await asyncio.to_thread(make)
            await page.until("document.querySelectorAll('#report svg').length === 4")
            line = await page.value("document.querySelector('#line').textContent")
            assert await page.value("document.documentElement.scrollWidth <= 390"), "wider than a phone"
            await page.choose("#enabled", "false")
            await page.until("document.querySelector('#state').textContent === 'Off: the next sampling run is exact.'")
            await asyncio.to_thread(make)
            await page.until("document.querySelector('#line').textContent.includes('enabled = false')")
            return line

    with start(patched_python, {"TAYLOR_PATCH": "1", "TAYLOR_PATCH_CONFIG": str(config)}) as server:
        line = asyncio.run(visit(server))
    assert summaries(server)[0] == f"taylor_patch: {line}" and "near_far" in line and "compared with exact attention: " in line
