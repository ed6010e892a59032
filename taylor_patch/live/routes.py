"""The page's routes for ComfyUI's server (aiohttp). ComfyUI imports aiohttp before this; nobody else imports this."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from taylor_patch.engine import engine
from taylor_patch.errors import ConfigError, nearest
from taylor_patch.live import settings_file
from taylor_patch.live.state import SWITCHES, next_config, report, state
from taylor_patch.report.page import STYLE

PATH = "/taylor_patch"
HEADERS = {
    "Cache-Control": "no-store",
    "X-Frame-Options": "SAMEORIGIN",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
                               "base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
}

Handler = Callable[[web.Request], Awaitable[web.Response]]


def add(routes: web.RouteTableDef) -> None:
    """Put the page's routes into `routes`. Raises ValueError where one is taken: aiohttp would refuse the whole table."""
    table: list[tuple[str, str, Handler]] = [("GET", PATH, show_page), ("GET", f"{PATH}/state", show_state),
                                             ("GET", f"{PATH}/report", show_report), ("POST", f"{PATH}/state", change_state)]
    taken = {getattr(route, "path", None) for route in routes}
    for _, path, _ in table:
        if path in taken:
            raise ValueError(f"{path} is another's")
    for method, path, handler in table:
        routes.route(method, path)(handler)


def cross_origin(headers: Mapping[str, str]) -> bool:
    """Whether a page of another origin sent the request, or one that hides its origin ("null").

    ComfyUI's own check is for requests to loopback addresses; it passes "null", and is off with --enable-cors-header. Here the browser's
    word (Sec-Fetch-Site) decides where there is one, else whether Origin names the host that was asked. Programs send neither.
    """
    site = headers.get("Sec-Fetch-Site")
    if site is not None:
        return site not in ("same-origin", "none")  # none: typed by the user
    origin = headers.get("Origin")
    return origin is not None and origin.partition("://")[2].lower() != headers.get("Host", "").lower()


def where_wanted(handler: Handler) -> Handler:
    """`handler`, or "not found" where [taylor_patch] has page = false."""
    @functools.wraps(handler)
    async def checked(request: web.Request) -> web.Response:
        if not next_config(engine())[0].settings.page:
            raise web.HTTPNotFound(text="page = false")
        return await handler(request)

    return checked


def same_origin(handler: Handler) -> Handler:
    """`handler`, or "forbidden" for pages of another origin; they may link to the page, but neither read nor change anything."""
    @functools.wraps(handler)
    async def checked(request: web.Request) -> web.Response:
        if cross_origin(request.headers):
            raise web.HTTPForbidden(text="The request comes from a page of another origin.")
        return await handler(request)

    return checked


@where_wanted
async def show_page(request: web.Request) -> web.Response:
    """page.html with the report's style."""
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8").replace("/* the report's style */", STYLE)
    return web.Response(text=html, content_type="text/html", headers=HEADERS)


@where_wanted
@same_origin
async def show_state(request: web.Request) -> web.Response:
    """state.state() as JSON."""
    return web.json_response(state(), headers=HEADERS)


@where_wanted
@same_origin
async def show_report(request: web.Request) -> web.Response:
    """state.report()."""
    return web.Response(text=report(), content_type="text/html", headers=HEADERS)


@where_wanted
@same_origin
async def change_state(request: web.Request) -> web.Response:
    """JSON object: keys of SWITCHES go into the configuration file, compare_next (true or false) is kept until the next sampling run.

    Answers with the new state, or with status 400 and {"error"}; then nothing was changed.
    """
    try:
        if request.content_type != "application/json":
            raise ConfigError(f"Content-Type is {request.content_type}; send application/json")
        wanted = _checked(await request.json())
        if settings := {key: value for key, value in wanted.items() if key in SWITCHES}:
            settings_file.change(engine(), settings)
    except (ConfigError, ValueError) as error:  # ValueError: not JSON
        return web.json_response({"error": str(error)}, status=400, headers=HEADERS)
    engine().compare_next = wanted.get("compare_next", engine().compare_next)
    return web.json_response(state(), headers=HEADERS)


def _checked(wanted: Any) -> dict[str, Any]:
    """`wanted` where it is an object of known keys and plain values. Raises ConfigError."""
    known = (*SWITCHES, "compare_next")
    if not isinstance(wanted, dict):
        raise ConfigError(f"send a JSON object of {', '.join(known)}")
    for key, value in wanted.items():
        if key not in known:
            raise ConfigError(f"{key}: unknown key; allowed are {', '.join(known)}." + nearest(key, known))
        if not isinstance(value, bool if key == "compare_next" else bool | str | int | float):
            raise ConfigError(f"{key}: {value!r} is not {'true or false' if key == 'compare_next' else 'a plain value'}")
    return wanted
