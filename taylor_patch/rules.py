"""[[rules]]: conditions on a call, first match wins."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from taylor_patch.errors import nearest

if TYPE_CHECKING:
    from taylor_patch.call import AttentionCall

CONDITIONS = ("model", "tokens", "sigma", "layers", "kind", "head_dim", "mask")
RESPECT = ("override", "rule")
WORDS = {"kind": ("self", "joint", "cross"), "mask": ("none", "key", "row")}
_COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}
_NUMBER = re.compile(r"(>=|<=|==|>|<)?\s*([0-9.]+)$")
_LAYERS = re.compile(r"(\d*)-(\d*)$|(\d+)$")


@dataclass(frozen=True)
class Conditions:
    """Parsed `when`; None means that the condition was not given."""

    model: str | None = None
    tokens: tuple[str, float] | None = None
    sigma: tuple[str, float] | None = None
    layers: tuple[int, int] | None = None
    kind: str | None = None
    head_dim: tuple[str, float] | None = None
    mask: str | None = None
    source: tuple[tuple[str, Any], ...] = ()

    def match(self, call: AttentionCall) -> bool:
        """True when every given condition holds; one on something unknown (sigma outside a run) does not hold."""
        return (
            (self.model is None or (call.model is not None and fnmatchcase(call.model.lower(), self.model.lower())))
            and _compare(self.tokens, call.q.shape[2])
            and _compare(self.sigma, call.sigma)
            and _compare(self.head_dim, call.q.shape[-1])
            and (self.layers is None or (call.block is not None and self.layers[0] <= call.block <= self.layers[1]))
            and (self.kind is None or _is_kind(self.kind, call))
            and (self.mask is None or self.mask == ("row" if call.row_mask is not None else "none" if call.key_mask is None else "key"))
        )


@dataclass(frozen=True)
class Rule:
    """One of [[rules]]: where `conditions` hold, `backend` and `quality` replace those of [taylor_patch].

    respect: "override", what goes without saying: a node's attention override and the checkpoint's own attention win; "rule": the rule
    wins, and what its backend cannot do is left to them.
    """

    conditions: Conditions
    backend: str | None
    quality: float | None
    place: str
    respect: str | None = None


def _compare(bound: tuple[str, float] | None, value: float | None) -> bool:
    return bound is None or (value is not None and bool(_COMPARE[bound[0]](value, bound[1])))


def _is_kind(kind: str, call: AttentionCall) -> bool:
    """"cross": other keys than queries; "self": the same; "joint": the same, and text tokens are known to be among them."""
    if kind == "joint":
        return call.self_attention and call.grid is not None and call.grid.tokens < call.q.shape[2]
    return (kind == "self") == call.self_attention


def parse_conditions(when: Mapping[str, Any]) -> Conditions:
    """`when` of a rule, for example {model = "flux*", tokens = ">=8192", layers = "4-", kind = "self"}.

    Raises ValueError with what is wrong and what is allowed.
    """
    parsed: dict[str, Any] = {"source": tuple(when.items())}
    for name, value in when.items():
        if name not in CONDITIONS:
            raise ValueError(f'unknown condition "{name}"; allowed are {", ".join(CONDITIONS)}.' + nearest(name, CONDITIONS))
        if name == "model":
            parsed[name] = str(value)
        elif name in WORDS:
            if value not in WORDS[name]:
                raise ValueError(f'{name} "{value}" is not one of {", ".join(WORDS[name])}.' + nearest(str(value), WORDS[name]))
            parsed[name] = value
        elif name == "layers":
            match = _LAYERS.match(str(value))
            if not match or str(value) == "-":
                raise ValueError(f'layers "{value}" is not like "4", "4-", "-8" or "4-8"')
            first, last, only = match.groups()
            parsed[name] = (int(only), int(only)) if only else (int(first or 0), int(last or 10**9))
        else:
            match = _NUMBER.match(str(value).strip())
            if not match:
                raise ValueError(f'{name} "{value}" is not like ">=8192"; allowed are {", ".join(_COMPARE)}')
            parsed[name] = (match[1] or "==", float(match[2]))
    return Conditions(**parsed)
