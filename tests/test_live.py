"""The page at /taylor_patch: its routes, the check of origin, the settings that it writes, and the comparison with exact attention."""

from __future__ import annotations

import asyncio
import logging
import sys
from types import ModuleType

import pytest
import torch

import taylor_patch
from taylor_patch import guard, startup
from taylor_patch.config import file_layer, merge
from taylor_patch.engine import engine
from taylor_patch.errors import ConfigError
from taylor_patch.hooks import server as hook
from taylor_patch.live import settings_file
from taylor_patch.live.state import report, state
from tests.test_guard_and_telemetry import SPARSE, run

try:
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer
except ImportError:
    web = None

needs_aiohttp = pytest.mark.skipif(web is None, reason="aiohttp, which ComfyUI brings with it, is not installed")

COMMENTED = """# mine
[taylor_patch]   # all of it
min_tokens = 64  # small
[backends.near_far]
density = 0.3
[[rules]]
when = { tokens = ">=100000" }
backend = "sdpa"
"""


def result(comfy):
    """What the last evaluation of a run gave, for the same q, k, v each time."""
    torch.manual_seed(0)
    return torch.stack(run(comfy)[-1])


def written(path):
    return merge([file_layer(path)], engine().registry.option_types)


def test_a_change_keeps_comments_and_all_else(configure):
    path = configure(COMMENTED)
    settings_file.change(engine(), {"backend": "near_far", "quality": 0.03, "enabled": False})
    text, config = path.read_text(), written(path)
    assert all(line in text.splitlines() for line in COMMENTED.splitlines())
    s = config.settings
    assert (s.backend, s.quality, s.enabled, s.min_tokens) == ("near_far", 0.03, False, 64)
    assert len(config.rules) == 1 and config.options["near_far"].density == 0.3
    assert engine().config.settings.backend == "auto", "in force only from the next run on"
    engine().reload()
    assert engine().config.settings.backend == "near_far"


def test_without_a_file_one_is_made_in_comfyuis_user_folder(tmp_path, monkeypatch):
    folder_paths = ModuleType("folder_paths")
    folder_paths.get_user_directory = lambda: str(tmp_path / "user")
    monkeypatch.setitem(sys.modules, "folder_paths", folder_paths)
    settings_file.change(engine(), {"quality": "fast"})
    assert (tmp_path / "user" / "taylor_patch.toml").read_text() == '[taylor_patch]\nquality = "fast"\n'
    assert engine().load().settings.quality == "fast" and [path.name for path in tmp_path.iterdir()] == ["user"]


@pytest.mark.parametrize(("text", "settings", "message"), [
    ("[taylor_patch]\n", {"backend": "near_fra"}, r':2:1: taylor_patch.backend: "near_fra" is not one of .* Did you mean "near_far"'),
    ("[taylor_patch]\n", {"quality": 3.5}, r":2:1: taylor_patch.quality: 3.5 is outside"),
    ("[taylor_patch]\nlog = 3\n", {"backend": "sdpa"}, r":2:1: taylor_patch.log: 3 is not"),
    ("[taylor_patch\n", {"backend": "sdpa"}, r":1:\d+: not valid TOML"),
    ("taylor_patch = 3\n", {"backend": "sdpa"}, r":1:1: taylor_patch: must be a table"),
    ('[taylor_patch]\nprofile = "p"\n[profiles.p]\nbackend = "sdpa"\n', {"backend": "near_far"},
     r'taylor_patch.backend: it is set by the profile "p"'),
])
def test_what_cannot_be_is_refused_with_its_place(configure, text, settings, message):
    path = configure(text)
    with pytest.raises(ConfigError, match=message):
        settings_file.change(engine(), settings)
    assert path.read_text() == text and len(list(path.parent.iterdir())) == 1


def test_a_variable_goes_before_the_file(configure, monkeypatch):
    monkeypatch.setenv("TAYLOR_PATCH", "near_far")
    path = configure("")
    with pytest.raises(ConfigError, match=r"^taylor_patch.backend: it is set by the variable TAYLOR_PATCH=near_far, which goes before"):
        settings_file.change(engine(), {"backend": "sdpa"})
    assert state()["settings"]["backend"] == {"value": "near_far", "set_elsewhere": "the variable TAYLOR_PATCH=near_far"}
    assert state()["settings"]["quality"]["set_elsewhere"] is None and path.read_text() == ""


def test_a_file_that_cannot_be_written_is_named(configure, monkeypatch):
    path = configure("")
    monkeypatch.setattr(settings_file.os, "replace", lambda *names: (_ for _ in ()).throw(OSError(16, "Device or resource busy")))
    with pytest.raises(ConfigError, match=r"taylor_patch.toml: cannot be written \(Device or resource busy\)"):
        settings_file.change(engine(), {"quality": "fast"})
    assert [item.name for item in path.parent.iterdir()] == ["taylor_patch.toml"] and path.read_text() == ""


def test_state_and_report_of_a_run(comfy, configure, tmp_path):
    path = configure(SPARSE.replace("[backends", f'log_file = "{tmp_path}/secret.jsonl"\n[backends'))
    assert state()["last_run"] is None and report() == ""
    run(comfy)
    shown = state()
    assert shown["patched"] and shown["problem"] is None and shown["file"] == str(path) and shown["running"] == []
    assert shown["last_run"] == engine().last_run.line() and "near_far" in shown["last_run"]
    assert shown["backends"][0]["name"] == "near_far" and shown["qualities"]["fast"] == 0.1
    assert report().count("<svg") == 4 and "secret" not in report() + str(shown)


def test_a_run_in_progress_is_shown(configure):
    configure("")
    with engine().run([1.0, 0.0]) as current:
        current.tally.exact("too small")
        (line,) = state()["running"]
    assert "exact 1 (exact because: too small: 1)" in line and line.endswith("in progress") and state()["running"] == []


def test_an_invalid_file_is_shown_with_its_place(configure):
    configure("[taylor_patch]\nquality = 'fats'\n")
    assert ':2:1: taylor_patch.quality: "fats" is not one of' in state()["problem"]


def test_the_next_run_only_is_compared_and_its_result_is_the_same(comfy, configure, caplog):
    configure(SPARSE)
    caplog.set_level(logging.INFO, "taylor_patch")
    before = result(comfy)
    engine().compare_next = True
    compared = result(comfy)
    after = result(comfy)
    assert torch.equal(before, compared) and torch.equal(before, after)
    first, second, third = (record.message for record in caplog.records if "model evaluations" in record.message)
    assert "compared" not in first + third and "compared with exact attention: " in second
    block = next(block for step in engine().last_steps for block in step.blocks)
    assert block.compared is None


def test_the_comparison_is_the_distance_over_all_rows(comfy, configure):
    configure(SPARSE)
    engine().compare_next = True
    run(comfy)
    blocks = [block for step in engine().last_steps for block in step.blocks]
    assert blocks and all(block.compared["exact_milliseconds"] > 0 for block in blocks)
    assert all(0 < block.compared["error"] < 1 for block in blocks)


def test_distance():
    exact, noise = (torch.randn(2, 3, 100, 16, dtype=torch.bfloat16) for _ in "en")
    out = exact + noise / 8
    expected = (out.double() - exact.double()).norm() / exact.double().norm()
    assert float(guard.distance(out, exact)) == pytest.approx(float(expected), rel=1e-5) and 0.1 < expected < 0.15
    assert float(guard.distance(exact, exact)) == 0 == float(guard.distance(exact * 0, exact * 0))


def test_a_comparison_that_fails_costs_a_line(comfy, configure, caplog, monkeypatch):
    configure(SPARSE)
    plain = result(comfy)
    engine().compare_next = True

    def out_of_memory(call):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(engine().router.backends["sdpa"], "run", out_of_memory)
    assert torch.equal(result(comfy), plain)
    assert [record.message for record in caplog.records if "comparison" in record.message] == [
        "taylor_patch: the comparison with exact attention ended (OutOfMemoryError: no room)."]


def test_a_run_without_answers_says_that_nothing_was_compared(comfy, configure):
    configure("[taylor_patch]\nbackend = 'sdpa'\n")
    engine().compare_next = True
    run(comfy)
    assert engine().last_run.line().endswith("compared with exact attention: no call to compare")


# The server


class PromptServer:
    """What the hook touches of ComfyUI's, with its order: the table under /api, the table, then a route for every path."""

    def __init__(self):
        self.app, self.routes = web.Application(), web.RouteTableDef()

    def add_routes(self):
        table = web.RouteTableDef()
        for route in self.routes:
            table.route(route.method, "/api" + route.path)(route.handler, **route.kwargs)
        self.app.add_routes(table)
        self.app.add_routes(self.routes)

        async def anything(request):
            return web.Response(text="ComfyUI")

        self.app.router.add_get("/{path:.*}", anything)


def answers(*requests, prepare=lambda server: None):
    """[(status, JSON or text)] of (method, path, keywords of aiohttp's request) at a server with the hook."""
    module = ModuleType("server")
    module.PromptServer = type("PromptServer", (PromptServer,), dict(vars(PromptServer)))
    hook.install(module)

    async def ask():
        server = module.PromptServer()
        prepare(server)
        server.add_routes()
        async with TestClient(TestServer(server.app)) as client:
            found = []
            for method, path, *rest in requests:
                keywords = rest[0] if rest else {}
                if "origin" in keywords:
                    keywords = {**keywords, "headers": {"Origin": keywords.pop("origin").format(host=f"{client.host}:{client.port}")}}
                reply = await client.request(method, path, **keywords)
                found.append((reply.status, await (reply.json() if reply.content_type == "application/json" else reply.text())))
            return found

    try:
        return asyncio.run(ask())
    finally:
        hook.uninstall()


CHANGE = ("POST", "/taylor_patch/state", {"json": {"backend": "sdpa"}})


@needs_aiohttp
def test_routes(comfy, configure):
    path = configure("")
    page, under_api, before, changed, fragment, other = answers(
        ("GET", "/taylor_patch"), ("GET", "/api/taylor_patch/state"), ("GET", "/taylor_patch/state"), CHANGE, ("GET", "/taylor_patch/report"),
        ("GET", "/other"))
    assert page[0] == 200 and "<title>taylor_patch</title>" in page[1] and "--series-0:" in page[1]
    assert "http" not in page[1] and " src=" not in page[1], "nothing is loaded from elsewhere"
    assert under_api == before and before[1]["settings"]["backend"]["value"] == "auto" and before[1]["patched"]
    assert changed[0] == 200 and changed[1]["settings"]["backend"]["value"] == "sdpa" and written(path).settings.backend == "sdpa"
    assert fragment == (200, "") and other == (200, "ComfyUI")


@needs_aiohttp
@pytest.mark.parametrize(("headers", "status"), [
    ({}, 200),
    ({"Origin": "http://HOST"}, 200),
    ({"Sec-Fetch-Site": "same-origin", "Origin": "https://behind.a.proxy"}, 200),
    ({"Origin": "https://evil.example"}, 403),
    ({"Origin": "http://127.0.0.1:1"}, 403),
    ({"Origin": "null"}, 403),
    ({"Host": "192.168.1.7:8188", "Origin": "http://192.168.1.7:8188"}, 200),
    ({"Host": "192.168.1.7:8188", "Origin": "https://evil.example"}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Sec-Fetch-Site": "same-site", "Origin": "http://HOST"}, 403),
], ids=str)
def test_origins(configure, headers, status):
    path = configure("")
    headers = {"Host": "127.0.0.1:8188", **headers}
    headers = {name: value.replace("HOST", headers["Host"]) for name, value in headers.items()}
    (change, read, page) = answers((*CHANGE[:2], {**CHANGE[2], "headers": headers}), ("GET", "/taylor_patch/state", {"headers": headers}),
                                   ("GET", "/taylor_patch", {"headers": headers}))
    assert change[0] == read[0] == status and page[0] == 200
    assert path.read_text() == ("" if status == 403 else '[taylor_patch]\nbackend = "sdpa"\n')


@needs_aiohttp
@pytest.mark.parametrize(("sent", "message"), [
    ({"json": {"bakcend": "sdpa"}}, 'bakcend: unknown key; allowed are enabled, backend, quality, compare_next. Did you mean "backend"?'),
    ({"json": {"page": False}}, "page: unknown key"),
    ({"json": {"backend": None}}, "backend: None is not a plain value"),
    ({"json": {"compare_next": 1}}, "compare_next: 1 is not true or false"),
    ({"json": ["backend"]}, "send a JSON object"),
    ({"json": {"backend": "sdpb", "compare_next": True}}, "taylor_patch.toml:2:1: taylor_patch.backend: \"sdpb\" is not one of"),
    ({"data": "{", "headers": {"Content-Type": "application/json"}}, "Expecting"),
    ({"data": '{"backend": "sdpa"}'}, "Content-Type is text/plain"),
], ids=str)
def test_wrong_requests_change_nothing(configure, sent, message):
    path = configure("")
    ((status, answer),) = answers(("POST", "/taylor_patch/state", sent))
    assert status == 400 and message in answer["error"] and path.read_text() == "" and not engine().compare_next


@needs_aiohttp
def test_compare_next_is_kept_and_taken_back(configure):
    configure("")
    on, off = answers(("POST", "/taylor_patch/state", {"json": {"compare_next": True}}),
                      ("POST", "/taylor_patch/state", {"json": {"compare_next": False}}))
    assert on[1]["compare_next"] is True and off[1]["compare_next"] is False


@needs_aiohttp
def test_page_false(configure):
    path = configure("[taylor_patch]\npage = false\n")
    assert {status for status, _ in answers(("GET", "/taylor_patch"), ("GET", "/taylor_patch/state"), CHANGE)} == {404}
    assert "backend" not in path.read_text()


@needs_aiohttp
def test_a_path_that_is_taken_costs_a_debug_line(configure, caplog):
    caplog.set_level(logging.DEBUG, "taylor_patch")

    def prepare(server):
        @server.routes.get("/taylor_patch")
        async def theirs(request):
            return web.Response(text="theirs")

    assert answers(("GET", "/taylor_patch"), ("GET", "/taylor_patch/state"), prepare=prepare) == [(200, "theirs"), (200, "ComfyUI")]
    assert [record.message for record in caplog.records if "no page" in record.message] == [
        "taylor_patch: no page: its routes cannot be added (ValueError: /taylor_patch is another's)"]


def test_another_programs_server_is_left_alone(caplog):
    caplog.set_level(logging.DEBUG, "taylor_patch")
    module = ModuleType("server")
    before = dict(vars(module))
    assert startup.HOOKS["server"] == hook.__name__
    hook.install(module)
    hook.uninstall()
    assert vars(module) == before and "no page: server has no PromptServer.add_routes" in caplog.text


def test_uninstall_puts_the_method_back():
    module = ModuleType("server")
    module.PromptServer = type("PromptServer", (), {"add_routes": lambda self: "added", "routes": None})
    original = module.PromptServer.add_routes
    hook.install(module)
    assert module.PromptServer.add_routes is not original and module.PromptServer().add_routes() == "added"
    hook.uninstall()
    assert module.PromptServer.add_routes is original


def test_hook_imports_nothing_heavy(tmp_path):
    from tests.test_imports import fresh

    loaded = fresh("import sys, taylor_patch; taylor_patch._startup(); import types; from taylor_patch import startup\n"
                   "startup.fire('server', types.ModuleType('server')); print(*sys.modules)", "1")
    assert "taylor_patch.hooks.server" in loaded and not {"torch", "aiohttp", "taylor_patch.engine"} & set(loaded)
    assert taylor_patch.__version__
