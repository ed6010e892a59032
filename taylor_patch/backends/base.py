"""What a backend declares and does. Third parties subclass Backend; docs/writing-a-backend.md is the guide."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from taylor_patch.call import AttentionCall
from taylor_patch.declaration import NoOptions

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32})


class Fallback(Exception):
    """Raised by run() when a backend finds during the work that its result would be wrong; the text is the reason.

    The caller then answers with exact attention on the same inputs.
    """


class Backend:
    """One way to compute attention.

    Class attributes are the declaration; `reasons_against` reads them. Instances are made with the options of
    `[backends.NAME]` and are replaced, never changed, when the configuration changes.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    priority: ClassVar[int] = 0
    """`auto` tries higher priorities first."""
    devices: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda"})
    dtypes: ClassVar[frozenset[torch.dtype]] = FLOATS
    head_dims: ClassVar[range] = range(1, 257)
    key_masks: ClassVar[bool] = True
    gqa: ClassVar[bool] = True
    cross_attention: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = False
    """Whether self-attention needs call.grid. Cross-attention has to do without: nobody knows how its keys lie."""
    deterministic: ClassVar[bool] = True
    """The same call gives the same bits twice."""
    options_type: ClassVar[type] = NoOptions

    @classmethod
    def declaration_problems(cls) -> list[str]:
        """What is wrong with the class attributes, as "attribute = value: what it has to be"; looked at when the backend is loaded."""
        wanted = {
            "devices": ("a set of device types, such as frozenset({\"cuda\"})", _all_are(str, cls.devices)),
            "dtypes": ("a set of torch dtypes, such as frozenset({torch.float16})", _all_are(torch.dtype, cls.dtypes)),
            "head_dims": ("a range, such as range(16, 257, 16); say more in reasons_against", isinstance(cls.head_dims, range)),
        }
        return [f"{name} = {getattr(cls, name)!r}: it has to be {what}" for name, (what, right) in wanted.items() if not right]

    def __init__(self, options: Any = None) -> None:
        self.options = self.options_type() if options is None else options

    def unavailable(self) -> tuple[str, ...]:
        """Why this backend can run no call at all here (a package that is missing, say); empty when it can."""
        return ()

    def crossover_tokens(self, device: torch.device) -> int | None:
        """Tokens from which `auto` may use this backend on `device`, as measured; None where nobody measured."""
        return None

    def reasons_against(self, call: AttentionCall) -> tuple[str, ...]:
        """Every reason why this backend cannot run `call`; empty when it can. Reads shapes only."""
        batch, heads, n_q, head_dim = call.q.shape
        reasons = list(as_reasons(self.unavailable(), "unavailable()"))
        if call.q.device.type not in self.devices:
            reasons.append(f"device {call.q.device.type}")
        if call.q.dtype not in self.dtypes:
            reasons.append(f"dtype {dtype_name(call.q)}")
        reasons += [f"{name} is {dtype_name(x)}, q is {dtype_name(call.q)}" for name, x in (("k", call.k), ("v", call.v))
                    if x.dtype != call.q.dtype]
        if head_dim not in self.head_dims:
            reasons.append(f"head_dim {head_dim} outside {self.head_dims.start} to {self.head_dims.stop - 1}")
        if call.row_mask is not None:
            reasons.append("mask depends on the query row")
        if call.key_mask is not None and not self.key_masks:
            reasons.append("key mask")
        if heads != call.k.shape[1] and not self.gqa:
            reasons.append("grouped-query attention")
        if not call.self_attention and not self.cross_attention:
            reasons.append("cross-attention")
        if self.needs_grid and call.grid is None and call.self_attention:
            reasons.append(call.grid_reason)
        if 0 in (batch, n_q, call.k.shape[2]):
            reasons.append("empty input")
        return tuple(reasons)

    def workspace_nbytes(self, call: AttentionCall) -> int:
        """Bytes of temporary memory beside inputs and output, from shapes only."""
        raise NotImplementedError(f"{self.name} does not state its workspace")

    def effective(self, call: AttentionCall) -> AttentionCall:
        """`call` with the q and k that this backend works with; `call` itself where it takes them as they are."""
        return call

    def denominators(self) -> dict[str, float] | None:
        """telemetry.DENOMINATORS of the last call for the records, where the backend keeps any that cost no wait for the device; and R, how
        many features each of them sums over."""
        return None

    def observed(self, call: AttentionCall) -> Mapping[str, Tensor]:
        """Name -> scalar on the device that says something of `call`, asked for after run(); read and recorded at the evaluation's end."""
        return {}

    def read_back(self, signature: Any, block: int | None, observed: Mapping[str, float], counts: bool, memo: dict[Any, Any]) -> None:
        """What `observed` has said of the last call with this signature in this block of an evaluation, which has come to its end.

        counts: no check of the result failed, and its sampled error is within the limit. memo: the run's (AttentionCall.memo).
        """

    def too_slow(self, observed: Mapping[str, float]) -> str | None:
        """Why exact attention is the better choice for such a call in this block, given what was observed of it; None where it is not."""
        return None

    def keep(self, memo: dict[Any, Any]) -> None:
        """Called at the end of a sampling run in which this backend did not fail: what the run has settled in its memo
        (AttentionCall.memo) may be stored for the next one (cache.py, tensor_cache.py)."""

    def release(self) -> None:
        """Let go of device memory that is kept between calls, tables and what runs in progress have settled; asked for when the device
        has run out of it."""

    def run(self, call: AttentionCall) -> Tensor:
        """Attention of `call` as [B, H, N_q, D] in q's dtype. Raises Fallback instead of returning a bad result."""
        raise NotImplementedError(f"{self.name} does not compute")


def as_reasons(found: object, source: str) -> tuple[str, ...]:
    """What `source`, a method of a backend, returned as reasons, as a tuple; one text is one reason. Raises TypeError for anything else."""
    if isinstance(found, str):
        return (found,)
    if not isinstance(found, tuple | list) or not all(isinstance(reason, str) for reason in found):
        raise TypeError(f"{source} returned {found!r}, not a tuple of reasons")
    return tuple(found)


def dtype_name(x: Tensor) -> str:
    """"float16", for a message."""
    return str(x.dtype).removeprefix("torch.")


def _all_are(kind: type, values: object) -> bool:
    return isinstance(values, Collection) and not isinstance(values, str) and all(isinstance(value, kind) for value in values)


def expand_kv(x: Tensor, heads: int) -> Tensor:
    """[B, H_kv, N, D] -> [B, heads, N, D]: each key head serves heads / H_kv consecutive query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def launching_on(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which `device` is CUDA's current one: Triton launches there, whatever device the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def note_not_finite(out: Tensor, flag: Tensor) -> None:
    """Leave on a result what its kernel has found: flag, one float32 on the device, is 0 where every value of `out` is finite.

    Saves the caller from reading the whole result once more. `out` must not be changed afterwards.
    """
    out.taylor_patch_not_finite = flag  # type: ignore[attr-defined]


def not_finite(out: Tensor) -> Tensor:
    """Not zero where a result has a value that is not finite, on the device: what its kernel has noted, else by looking."""
    flag = getattr(out, "taylor_patch_not_finite", None)
    return ~torch.isfinite(out.sum(dtype=torch.float32)) if flag is None else flag


def aligned(x: Tensor) -> Tensor:
    """x, or a copy where its last dimension has gaps, or its data or a row does not begin at 16 bytes.

    Kernels that load 16 bytes at a time, PyTorch's own among them, end in a CUDA error on such a tensor, and after one the process
    can use the GPU no more. x must hold data, which it does not while torch.compile traces.
    """
    values = 16 // x.element_size()
    rows = all(stride % values == 0 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1)
    if x.data_ptr() % 16 == 0 and (x.is_contiguous() or (x.stride(-1) == 1 and rows)):
        return x
    return x.clone(memory_format=torch.contiguous_format)
