"""The public functions: attention and explain outside ComfyUI; install, uninstall and status inside it."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

from taylor_patch import config as configuration
from taylor_patch import engine as engines
from taylor_patch import startup
from taylor_patch.backends.base import Backend, Fallback, as_reasons
from taylor_patch.call import AttentionCall, TokenGrid, Unsupported, from_heads_first
from taylor_patch.errors import BackendRefused, TaylorPatchError, said
from taylor_patch.quality import QUALITIES
from taylor_patch.router import Choice
from taylor_patch.run import current_run


def install() -> None:
    """Patch what ComfyUI has imported, and the rest when it imports it. Does what TAYLOR_PATCH=1 does at start-up."""
    startup.activate()
    for target in startup.HOOKS:
        module = sys.modules.get(target)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            startup.fire(target, module)


def uninstall() -> None:
    """Restore every patched name to the original object and forget plugins and configuration."""
    for hook in startup.HOOKS.values():
        if hook in sys.modules:
            importlib.import_module(hook).uninstall()
    startup.fired.clear()
    engines.reset()


def status() -> dict[str, Any]:
    """What is in place, and what was done: {"registered", "hooks", "patched", "chains", "settings", "problem", "plugins", "current_run",
    "last_run", "totals"}.

    chains: function -> who patched it, outermost first. current_run, last_run, totals: RunSummary, RunSummary and Totals of all runs, the
    one in progress included; None where there is no such run. May be called from any thread.
    """
    attention_hook = sys.modules.get("taylor_patch.hooks.attention")
    current, run = engines.engine(), current_run()
    running = None if run is None else run.summary("in progress")
    return {
        "registered": startup.registered,
        "hooks": dict(startup.fired),
        "patched": list(attention_hook.patched()) if attention_hook else [],
        "chains": importlib.import_module("taylor_patch.hooks.chain").chains() if attention_hook else {},
        "settings": current.describe(),
        "problem": current.problem,
        "plugins": current.registry.plugins,
        "current_run": running,
        "last_run": current.last_run,
        "totals": current.totals.including(running),
    }


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", mask: Tensor | None = None, scale: float | None = None,
              grid: tuple[int, int, int] | None = None, text: tuple[int, int] | None = None, quality: str | float | None = None,
              options: Mapping[str, Any] | None = None) -> Tensor:
    """Attention outside ComfyUI, by a backend that is named or by the one that `auto` takes.

    q: [B, H, N, D]; k, v: [B, H_kv, M, D] with H a multiple of H_kv; fp16, bf16 or fp32, any strides. They are not changed.
    backend: "auto" (exact attention where no backend is known to be faster), "sdpa" (exact) or a name of `taylor-patch backends`.
    mask: bool (True = keep) or additive, 2-D to 4-D, broadcast as scaled_dot_product_attention does.
    scale: factor of q.k before the softmax, 1/sqrt(D) unless given.
    grid: (t, h, w) of the image or video tokens, row-major; t = 1 for an image. Backends that use neighbourhood need it in self-attention.
        In cross-attention (M differs from N) that of q, or of k and v where these have just so many tokens.
    text: (start, stop) of the tokens that are not of the grid; they come before or after it.
    quality: "lossless", "balanced", "fast" or a relative L2 error; of the configuration unless given.
    options: options of the named backend, as under [backends.NAME]; of the configuration unless given.
    Returns [B, H, N, D] in q's dtype. Raises BackendRefused with every reason where a named backend cannot run, or returns something
    else (it never takes another instead), TaylorPatchError where an argument is of the wrong kind or they do not fit together, ConfigError
    for wrong options or quality.
    """
    call = _call(q, k, v, mask, scale, grid, text, quality)
    choice = _choose(call, backend, options)
    if choice.backend is None and backend not in ("auto", "sdpa"):
        hint = " Pass grid=(t, h, w)." if any("grid" in reason for reason in choice.reasons) and grid is None else ""
        raise BackendRefused(f"{_shown(backend, call)}: {'; '.join(choice.reasons)}.{hint} Use backend=\"sdpa\" for exact attention.")
    exact = engines.engine().router.backends["sdpa"]
    chosen = choice.backend or exact
    try:
        out = chosen.run(call)
    except Fallback as reason:
        if backend == "auto":
            return exact.run(call)
        raise BackendRefused(f"{_shown(backend, call)}: {reason}. Use backend=\"sdpa\" for exact attention.") from None
    if problem := engines.check_form(out, call):
        raise BackendRefused(f'backend "{chosen.name}" {problem}. Repair it, or use backend="sdpa" for exact attention.')
    return out


def explain(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", mask: Tensor | None = None, scale: float | None = None,
            grid: tuple[int, int, int] | None = None, text: tuple[int, int] | None = None, quality: str | float | None = None,
            options: Mapping[str, Any] | None = None) -> Choice:
    """The Choice that `attention` would make with these arguments, with all reasons; nothing is run.

    Choice.backend is None where attention would be exact (or, for a named backend, refused).
    """
    return _choose(_call(q, k, v, mask, scale, grid, text, quality), backend, options)


def _call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, grid: tuple[int, int, int] | None,
          text: tuple[int, int] | None, quality: str | float | None) -> AttentionCall:
    for name, x in (("q", q), ("k", k), ("v", v), *([] if mask is None else [("mask", mask)])):
        if not isinstance(x, Tensor):
            raise TaylorPatchError(f"{name} is {type(x).__module__}.{type(x).__name__}; it has to be a torch.Tensor")
    _check_whole_numbers("grid", grid, "(t, h, w)")
    _check_whole_numbers("text", text, "(start, stop)")
    if quality is not None and (isinstance(quality, bool) or not isinstance(quality, str | int | float)):
        raise TaylorPatchError(f"quality is {quality!r}; it has to be one of {', '.join(QUALITIES)} or a number")
    try:
        of_keys = TokenGrid(*grid) if grid is not None and q.shape[2] != k.shape[2] == math.prod(grid) else None
        of_queries = None if grid is None or (of_keys is not None and text is None) else _placed_grid(q.shape[2], grid, text)
        target = configuration.quality_value(engines.engine().config.settings.quality if quality is None else quality)
        return from_heads_first(q, k, v, mask=mask, scale=scale, grid=of_queries, key_grid=of_keys, target_error=target)
    except Unsupported as error:
        raise TaylorPatchError(f"{error}: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}") from None


def _check_whole_numbers(name: str, values: object, form: str) -> None:
    """Raises TaylorPatchError where `values`, an argument that may be left out, is not of that form."""
    if values is None:
        return
    right = isinstance(values, Sequence) and len(values) == form.count(",") + 1
    if not right or any(not isinstance(value, Integral) or int(value) < 0 for value in values):  # type: ignore[attr-defined]
        raise TaylorPatchError(f"{name} is {values!r}; it has to be {form}, whole numbers from 0")


def _placed_grid(tokens: int, grid: tuple[int, int, int], text: tuple[int, int] | None) -> TokenGrid:
    """The grid in a sequence of `tokens` tokens whose others are [text[0], text[1])."""
    count, (start, stop) = grid[0] * grid[1] * grid[2], text or (0, 0)
    if count + stop - start != tokens or (start > 0 and start != count):
        raise TaylorPatchError(f"grid {tuple(grid)} ({count} tokens) and text {text} do not make up the {tokens} tokens of q: "
                               "text must be all tokens before or after the grid")
    return TokenGrid(*grid, start=0 if start > 0 else stop)


def _choose(call: AttentionCall, name: str, options: Mapping[str, Any] | None) -> Choice:
    router = engines.engine().router
    if not isinstance(name, str):
        raise TaylorPatchError(f"backend is {name!r}; it has to be one of {', '.join(['auto', *sorted(router.backends)])}")
    if options is not None and not isinstance(options, Mapping):
        raise TaylorPatchError(f"options is {options!r}; it has to be a mapping of option -> value, as under [backends.{name}]")
    if name == "auto":
        if options is not None:
            raise TaylorPatchError('options are those of one backend; name it instead of "auto"')
        return router.automatic(call)
    if name not in router.backends:
        raise BackendRefused("backend " + router.backends.unknown(name, ["auto", *sorted(router.backends)]))
    chosen = router.backends[name]
    try:
        if options is not None:
            chosen = _with_options(chosen, options)
        reasons = as_reasons(chosen.reasons_against(call), "reasons_against()")
    except TaylorPatchError:
        raise
    except Exception as error:
        raise BackendRefused(f"{router.backends.label(name)} cannot be asked whether it can run: {said(error)}") from error
    if name == "sdpa":
        return Choice(None, ('backend = "sdpa"',))
    return Choice(None, reasons) if reasons else Choice(chosen)


def _with_options(backend: Backend, options: Mapping[str, Any]) -> Backend:
    """Another backend of that kind. Raises ConfigError where the options are wrong, and what making it raises."""
    layer = configuration.Layer("options", {"backends": {backend.name: dict(options)}})
    return type(backend)(configuration.merge([layer], {backend.name: backend.options_type}).options[backend.name])


def _shown(name: str, call: AttentionCall) -> str:
    return (f'backend "{name}" cannot run q {list(call.q.shape)} {str(call.q.dtype).removeprefix("torch.")}, '
            f"k {list(call.k.shape)} on {call.q.device}")
