"""The tests of taylor_patch.testing.conformance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NoReturn

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from taylor_patch import config
from taylor_patch.backends.base import FLOATS, Backend, Fallback
from taylor_patch.call import AttentionCall
from taylor_patch.declaration import imported
from taylor_patch.engine import check_form
from taylor_patch.errors import said
from taylor_patch.plugins import declared
from taylor_patch.testing.cases import GRID, LAYOUTS, TEXT, changed, exact, key_mask, make_call, relative_error
from taylor_patch.testing.memory import peak_nbytes
from taylor_patch.testing.pytest_plugin import measured
from taylor_patch.time_limit import within

ROUNDING = {torch.float32: 0.0, torch.float16: 0.01, torch.bfloat16: 0.02}
"""What is added to max_error for inputs of a dtype."""
HEAD_DIMS = (16, 32, 40, 48, 64, 80, 96, 112, 120, 128, 160, 192, 256)
RAGGED = {"one token": ((1, 1, 1), 0), "63 tokens": ((1, 7, 9), 0), "100 tokens": ((1, 10, 10), 0), "a video with a text": ((3, 5, 9), 4),
          "edge tiles": ((1, 9, 17), 0)}
WORKSPACE_SLACK_NBYTES = 1 << 16

broke: dict[str, str] = {}
"""Device -> the test after which it could be used no more in this process."""


@dataclass(frozen=True)
class Subject:
    """What is tested; see taylor_patch.testing.conformance."""

    plugin: Any
    name: str
    options: dict[str, Any]
    device: str
    max_error: float
    load_seconds: float
    keys_multiple_of: int

    def __hash__(self) -> int:
        return id(self)


def named(dtype: torch.dtype) -> str:
    """ "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")


def memory_of(x: Tensor) -> Tensor:
    """All bytes of the memory that x is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


@cache
def _load(subject: Subject) -> Backend | str:
    """The backend with its options, or what keeps it from being loaded."""
    def load() -> Backend:
        declarations = {d.name: d for d in declared(imported(subject.plugin))}
        if subject.name not in declarations:
            raise LookupError(f"it registers {', '.join(declarations) or 'no backend'}, not {subject.name}")
        kind = declarations[subject.name].load()
        layer = config.Layer("options", {"backends": {subject.name: subject.options}})
        return kind(config.merge([layer], {subject.name: kind.options_type}).options[subject.name])

    try:
        return within(subject.load_seconds, load)
    except (Exception, SystemExit) as error:
        return said(error)


@cache
def _base_problem(subject: Subject) -> str | None:
    """Why the plainest call does not work, so that the tests of finer points need not say it again."""
    backend = _load(subject)
    if isinstance(backend, str):
        return "the plugin cannot be loaded"
    if subject.device not in backend.devices or backend.unavailable():
        return "; ".join(backend.unavailable()) or f"it is not for {subject.device}"
    call = make_call(_head_dim(backend), _dtype(backend), subject.device, text=_text(subject))
    if backend.reasons_against(call):
        return "it refuses the plainest call"
    try:
        return check_form(backend.run(call), call)
    except Exception as error:
        return said(error)


def _dtype(backend: Backend) -> torch.dtype:
    """float32 where the backend has it."""
    return next((dtype for dtype in ROUNDING if dtype in backend.dtypes), torch.float32)


def _head_dim(backend: Backend) -> int:
    return next((d for d in (64, 128, *HEAD_DIMS) if d in backend.head_dims), backend.head_dims[0])


def _text(subject: Subject) -> int:
    """Tokens before the grid: TEXT, and as many more as keys_multiple_of asks for."""
    return TEXT + -(math.prod(GRID) + TEXT) % subject.keys_multiple_of


def device_error(device: str) -> str | None:
    """The error that the work on `device` has ended in, waiting for it; None where all is well.

    After an error such as a misaligned address every later call to CUDA in the process fails, with the same words.
    """
    if device == "cpu":
        return None
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return said(error).splitlines()[0]
    return None


class Conformance:
    """What docs/writing-a-backend.md asks of a backend. Findings begin with the backend's name."""

    subject: ClassVar[Subject]

    def finding(self, text: str) -> NoReturn:
        """Fail with one line."""
        pytest.fail(f'backend "{self.subject.name}": {text}', pytrace=False)

    @pytest.fixture(autouse=True)
    def device_survives(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """A test that leaves the device unusable gets the finding; the tests after it, of other backends too, say nothing of theirs."""
        if self.subject.device in broke:
            pytest.skip(f"not run: {broke[self.subject.device]} left device {self.subject.device} unusable")
        yield
        if error := device_error(self.subject.device):
            broke[self.subject.device] = request.node.nodeid
            self.finding(f"{request.node.name} left device {self.subject.device} unusable for the rest of the process ({error})")

    @pytest.fixture
    def loaded(self) -> Backend:
        """The backend; skips where test_loads fails."""
        backend = _load(self.subject)
        if isinstance(backend, str):
            pytest.skip("see test_loads")
        return backend

    @pytest.fixture
    def backend(self, loaded: Backend) -> Backend:
        """The backend; skips where test_plainest_call fails, or it cannot run here."""
        if _base_problem(self.subject):
            pytest.skip("see test_plainest_call")
        return loaded

    def call(self, backend: Backend, **changes: Any) -> AttentionCall:
        """The plain call of this backend, changed."""
        dtype, head_dim = changes.pop("dtype", _dtype(backend)), changes.pop("head_dim", _head_dim(backend))
        changes.setdefault("text", _text(self.subject))
        return make_call(head_dim, dtype, self.subject.device, **changes)

    def run(self, backend: Backend, call: AttentionCall, what: str) -> Tensor:
        """The result for a call that the backend accepted, checked for its form."""
        try:
            out = backend.run(call)
            if error := device_error(self.subject.device):
                raise RuntimeError(error)
        except Fallback as reason:
            self.finding(f"{what}: accepted the call and then fell back ({reason})")
        except Exception as error:
            self.finding(f"{what}: accepted the call and then raised {said(error)}")
        if problem := check_form(out, call):
            self.finding(f"{what}: {problem}")
        if not bool(torch.isfinite(out).all()):
            self.finding(f"{what}: returned values that are not finite")
        return out

    def check(self, backend: Backend, call: AttentionCall, what: str) -> float:
        """Run an accepted call and compare with exact attention; the relative error."""
        answer = exact(call)
        error = relative_error(self.run(backend, call, what), answer)
        limit = self.subject.max_error + ROUNDING[call.q.dtype]
        if error > limit:
            self.finding(f"{what}: relative error {error:.3g} against exact attention is above {limit:g}")
        return error

    def refusal(self, backend: Backend, call: AttentionCall) -> tuple[str, ...]:
        """reasons_against, checked for its form."""
        reasons = backend.reasons_against(call)
        if not isinstance(reasons, tuple) or not all(isinstance(reason, str) and reason for reason in reasons):
            self.finding(f"reasons_against returned {reasons!r}, not a tuple of texts")
        return reasons

    def both_ways(self, backend: Backend, call: AttentionCall, does: bool, what: str) -> None:
        """What is declared is done right, what is not is refused."""
        reasons = self.refusal(backend, call)
        if does and reasons:
            self.finding(f"{what}: declared, but refused ({'; '.join(reasons)})")
        if not does and not reasons:
            self.finding(f"{what}: not declared, but accepted; reasons_against must give a reason")
        if does:
            self.check(backend, call, what)

    def test_loads(self) -> None:
        """The plugin is imported in time, and registers the backend, which is what its declaration says."""
        if isinstance(problem := _load(self.subject), str):
            self.finding(f"the plugin cannot be loaded: {problem}")

    def test_declaration(self, loaded: Backend) -> None:
        """Names, dtypes, head dims and options are of the right types."""
        options = loaded.options_type
        if not (dataclasses.is_dataclass(options) and options.__dataclass_params__.frozen):  # type: ignore[attr-defined]
            self.finding(f"options_type {options.__name__} is not a frozen dataclass")
        if not loaded.summary:
            self.finding("has no summary for `taylor-patch backends`")
        if not loaded.dtypes <= FLOATS:
            self.finding(f"declares dtypes other than {', '.join(sorted(map(named, FLOATS)))}")
        if not isinstance(loaded.head_dims, range) or not loaded.head_dims:
            self.finding(f"head_dims {loaded.head_dims!r} is not a range with something in it")

    def test_plainest_call(self, loaded: Backend) -> None:
        """Two batch entries, two heads, about 150 tokens, contiguous: accepted, and right; refused where it cannot run here."""
        reasons = self.refusal(loaded, self.call(loaded))
        unavailable = loaded.unavailable()
        if unavailable or self.subject.device not in loaded.devices:
            if not set(unavailable) <= set(reasons) or not reasons:
                self.finding(f"cannot run here ({'; '.join(unavailable)}), but reasons_against says {reasons}")
            pytest.skip(f"cannot run here: {'; '.join(reasons)}")
        if reasons:
            self.finding(f"refuses the plainest call ({'; '.join(reasons)}); set options under which it runs")
        self.check(loaded, self.call(loaded), "the plainest call")

    @pytest.mark.parametrize("dtype", sorted(FLOATS, key=str), ids=named)
    def test_dtypes(self, backend: Backend, dtype: torch.dtype) -> None:
        """Declared dtypes are done right, others refused; the error against exact attention is reported."""
        does = dtype in backend.dtypes
        self.both_ways(backend, self.call(backend, dtype=dtype), does, named(dtype))
        if does:
            call = self.call(backend, dtype=dtype)
            error = relative_error(backend.run(call), exact(call))
            measured.setdefault(backend.name, {})[f"error {named(dtype)}"] = f"{error:.1e}"

    def test_mixed_dtypes_are_refused(self, backend: Backend) -> None:
        """k of another dtype than q."""
        call = self.call(backend)
        other = torch.float16 if call.q.dtype == torch.float32 else torch.float32
        self.both_ways(backend, dataclasses.replace(call, k=call.k.to(other)), False, "k of another dtype than q")

    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_head_dims(self, backend: Backend, head_dim: int) -> None:
        """Head dims outside head_dims are refused, those inside are right or refused with a reason."""
        call = self.call(backend, head_dim=head_dim)
        inside = head_dim in backend.head_dims and not self.refusal(backend, call)
        self.both_ways(backend, call, inside, f"head_dim {head_dim}")

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, backend: Backend, layout: str) -> None:
        """Any strides give the same result."""
        call = self.call(backend)
        other = changed(call, LAYOUTS[layout])
        if not self.refusal(backend, other):
            self.check(backend, other, f"q, k and v {layout}")

    def test_batch_without_memory(self, backend: Backend) -> None:
        """A batch that is one entry expanded (stride 0)."""
        call = self.call(backend, batch=1)
        self.check(backend, changed(call, lambda x: x.expand(2, -1, -1, -1)), "an expanded batch")

    @pytest.mark.parametrize("size", RAGGED)
    def test_ragged_sizes(self, backend: Backend, size: str) -> None:
        """Any number of tokens is right or refused with a reason."""
        grid, text = RAGGED[size]
        call = self.call(backend, grid=grid, text=text)
        if not self.refusal(backend, call):
            self.check(backend, call, size)

    def test_scale(self, backend: Backend) -> None:
        """call.scale is used, not 1/sqrt(D)."""
        call = self.call(backend, scale=4 * _head_dim(backend) ** -0.5)
        call = dataclasses.replace(call, q=call.q / 2)
        self.check(backend, call, "a scale that is not 1/sqrt(D)")

    def test_key_mask(self, backend: Backend) -> None:
        """Key masks are done right, or refused where key_masks is False."""
        call = self.call(backend)
        self.both_ways(backend, dataclasses.replace(call, key_mask=key_mask(call)), backend.key_masks, "a key mask")

    def test_hidden_keys_do_not_matter(self, backend: Backend) -> None:
        """What stands at keys that the mask hides changes nothing."""
        if not backend.key_masks:
            pytest.skip("key_masks is False")
        call = self.call(backend)
        mask = key_mask(call)
        hidden = torch.isinf(mask[0])
        k, v = call.k.clone(), call.v.clone()
        k[:, :, hidden], v[:, :, hidden] = 3.0, -3.0
        first = self.run(backend, dataclasses.replace(call, key_mask=mask), "a key mask")
        second = self.run(backend, dataclasses.replace(call, k=k, v=v, key_mask=mask), "a key mask")
        if (difference := relative_error(second, first.double())) > 1e-3 + ROUNDING[call.q.dtype]:
            self.finding(f"keys that the mask hides change the result by {difference:.3g}")

    def test_row_mask(self, backend: Backend) -> None:
        """A mask that depends on the query row is done right or refused with a reason."""
        call = self.call(backend)
        rows = torch.ones(1, 1, call.q.shape[2], call.k.shape[2], dtype=torch.bool, device=call.q.device).tril()
        call = dataclasses.replace(call, row_mask=rows)
        if not self.refusal(backend, call):
            self.check(backend, call, "a mask by query row")

    def test_gqa(self, backend: Backend) -> None:
        """Four heads on two key heads: right, or refused where gqa is False."""
        self.both_ways(backend, self.call(backend, heads=4, kv_heads=2), backend.gqa, "grouped-query attention")

    def test_cross_attention(self, backend: Backend) -> None:
        """Fewer and more keys than queries, no grid: right, or refused where cross_attention is False."""
        for n_kv in (117, 261):
            call = self.call(backend, n_kv=n_kv + -n_kv % self.subject.keys_multiple_of)
            self.both_ways(backend, call, backend.cross_attention, "cross-attention")

    def test_without_a_grid(self, backend: Backend) -> None:
        """Where the token grid is not known: right, or refused where needs_grid is True."""
        self.both_ways(backend, dataclasses.replace(self.call(backend), grid=None), not backend.needs_grid, "no token grid")

    def test_empty_input_is_refused(self, backend: Backend) -> None:
        """No tokens at all."""
        call = self.call(backend)
        empty = dataclasses.replace(changed(call, lambda x: x[:, :, :0]), grid=None)
        self.both_ways(backend, empty, False, "empty input")

    def test_other_devices_are_refused(self, loaded: Backend) -> None:
        """A device that is not declared ("meta")."""
        call = self.call(loaded)
        if not self.refusal(loaded, changed(call, lambda x: x.to("meta"))):
            self.finding("accepts tensors on a device that it does not declare")

    def test_inputs_are_unchanged(self, backend: Backend) -> None:
        """q, k, v and the mask hold the same bits after the call, the memory around them too."""
        call = changed(self.call(backend), LAYOUTS["a part of packed q, k and v, [B, N, 3, H, D]"])
        inputs = {"q": call.q, "k": call.k, "v": call.v}
        if backend.key_masks:
            call = dataclasses.replace(call, key_mask=key_mask(call))
            inputs["key_mask"] = call.key_mask  # type: ignore[assignment]
        before = {name: memory_of(x).clone() for name, x in inputs.items()}
        backend.run(call)
        if written := [name for name, x in inputs.items() if not torch.equal(memory_of(x), before[name])]:
            self.finding(f"writes into {', '.join(written)}")

    def test_result_is_its_own(self, backend: Backend) -> None:
        """The result shares no memory with the inputs."""
        call = self.call(backend)
        out = self.run(backend, call, "the plainest call")
        shared = [name for name in "qkv" if getattr(call, name).untyped_storage().data_ptr() == out.untyped_storage().data_ptr()]
        if shared:
            self.finding(f"returns the memory of {shared[0]}")

    def test_every_output_is_written(self, backend: Backend) -> None:
        """Memory from torch.empty holds NaN: none of it may reach the result."""
        call = self.call(backend)
        plain = self.run(backend, call, "the plainest call")
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
        try:
            poisoned = backend.run(call)
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        if not bool(torch.isfinite(poisoned).all()) or relative_error(poisoned, plain.double()) > 1e-3:
            self.finding("reads memory that it did not write (torch.empty)")

    def test_deterministic(self, backend: Backend) -> None:
        """The same call twice gives the same bits where deterministic is True."""
        if not backend.deterministic:
            pytest.skip("deterministic is False")
        call = self.call(backend)
        if not torch.equal(backend.run(call), backend.run(call)):
            self.finding("declared deterministic, but two runs differ")

    def test_workspace(self, backend: Backend) -> None:
        """workspace_nbytes is a whole number from the shapes, and not below what is used."""
        call = self.call(backend)
        stated = backend.workspace_nbytes(call)
        if not isinstance(stated, int) or isinstance(stated, bool) or stated < 0:
            self.finding(f"workspace_nbytes returned {stated!r}, not a number of bytes")
        backend.run(call)  # what is kept from call to call is there now
        out_nbytes = call.q.numel() * call.q.element_size()
        used = max(0, peak_nbytes(lambda: backend.run(call), [call.q, call.k, call.v]) - out_nbytes)
        measured.setdefault(backend.name, {})["workspace"] = f"{used / 1024:.0f} KiB of {stated / 1024:.0f} stated"
        if used > stated + WORKSPACE_SLACK_NBYTES:
            self.finding(f"uses {used} bytes of temporary memory, workspace_nbytes says {stated}")

    def test_reasons_and_workspace_read_shapes_only(self, backend: Backend) -> None:
        """Neither reads values: both work on tensors that have none."""
        call, mode = self.call(backend), FakeTensorMode()
        fake = changed(call, mode.from_tensor)
        with mode:
            try:
                backend.reasons_against(fake)
                backend.workspace_nbytes(fake)
            except Exception as error:
                self.finding(f"reasons_against or workspace_nbytes reads the values of tensors ({type(error).__name__})")

    def test_compiles(self, backend: Backend) -> None:
        """Inside torch.compile the result is the same; graph breaks are allowed."""
        call = self.call(backend)
        plain = self.run(backend, call, "the plainest call")
        torch._dynamo.reset()

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return backend.run(dataclasses.replace(call, q=q, k=k, v=v)) + 0

        try:
            compiled = torch.compile(attend, backend="aot_eager")(call.q, call.k, call.v)
        except Exception as error:
            self.finding(f"cannot run inside torch.compile ({type(error).__name__}: {str(error).splitlines()[0]})")
        finally:
            torch._dynamo.reset()
        if (difference := relative_error(compiled, plain.double())) > 1e-3 + ROUNDING[call.q.dtype]:
            self.finding(f"gives another result inside torch.compile (relative difference {difference:.3g})")
