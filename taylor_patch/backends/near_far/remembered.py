"""What near_far has settled: by prompt, block and sigma bin for a run in progress and, with `remember = true`, on disk for the next run of
the model at that size. The first lives in the run's memo, so that runs at once, or one inside another, share nothing but the disk.

What the disk has may be of another LoRA, prompt or seed, so it has to earn its use in every run, block by block. A probe's result is
compared on the device with what the disk has for that sigma bin, and the comparison is read with the other figures at the evaluation's
end. Where the two agree, the next sigma bin of that block comes from the disk, after a second agreement the next two; then a probe looks
again. The first sigma bin of a run is no evidence: noise looks alike to all models (docs/adr/0012).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from taylor_patch import cache, long_lived, tensor_cache
from taylor_patch.backends.near_far.aim import Settled
from taylor_patch.backends.targets import sigma_bin
from taylor_patch.call import AttentionCall, TokenGrid

KIND = "near_far"
VERSION = 2
"""Changed whenever a setting of old no longer means what it did."""
LIMIT = 1024
"""Blocks (times shapes) of a run whose values are kept."""
MOST_AHEAD = 2
"""Sigma bins that come from the disk, at most, before a probe looks again."""
TOLERANCE, STRAY_HEADS = 1.15, 0.1
"""Values agree where at most so many heads need more than so many times the density on disk; error is about inverse to density, and
targets.MARGIN leaves room for 1.33 ..."""
SURPLUS = 1.25
"""... and where the disk's mean density is at most so many times the one that is needed."""
ANY_EXACT = 0.999
"""A head that is exact never agrees: how much it needs is not known."""
AT_ONCE = 32
"""Values whose sinks are looked up together at a run's end: 32 x heads x blocks bytes."""


@dataclass
class Found:
    """Values of a block in a sigma bin. observed: scalars on the device. counts: an evaluation with them came to a good end."""

    settled: Settled
    observed: Mapping[str, Tensor]
    probed: bool
    counts: bool = False


@dataclass
class Block:
    """A block of the model in a run, for one form of calls (_form)."""

    number: int
    first: int
    """Sigma bin of its first call."""
    shelf: Shelf
    found: dict[int, Found] = field(default_factory=dict)
    latest: int = 0
    """Sigma bin of the last probe."""
    agreements: int = 0
    """How many probes have agreed with the disk since one did not."""
    ahead: int = 0
    """Sigma bins that may come from the disk before the next probe."""
    strayed: bool = False
    """A probe has not agreed with the disk: what this run has found takes its place."""
    spoiled: bool = False
    """An evaluation with these values did not come to a good end: nothing is kept of them, on disk neither."""

    def heard(self, found: Found, agrees: bool) -> None:
        """The comparison of a probe with the disk has been read."""
        self.strayed = self.strayed or not agrees
        if found is not self.found.get(self.first):
            self.agreements = self.agreements + 1 if agrees else 0
            self.ahead = min(self.agreements, MOST_AHEAD)

    def new(self) -> Iterator[tuple[int, Found]]:
        """(sigma bin, values) that the disk is to have and has not."""
        for number, one in self.found.items():
            if one.probed and one.counts and not self.spoiled and (self.strayed or (self.number, number) not in self.shelf.rows):
                yield number, one


class Memories:
    """One Memory for each run, in the run's memo, and gone with it."""

    def __init__(self, remember: bool) -> None:
        self._remember = remember
        self._lock = threading.Lock()
        self._open: WeakSet[Memory] = WeakSet()

    def of(self, memo: dict[Any, Any]) -> Memory:
        """The memory of the run with this memo (AttentionCall.memo)."""
        with self._lock:
            if self not in memo:
                memo[self] = Memory(self._remember)
                self._open.add(memo[self])
            return memo[self]  # type: ignore[no-any-return]

    def clear(self) -> None:
        """Forget what all runs in progress have settled, but for what is on disk."""
        with self._lock:
            memories = list(self._open)
        for memory in memories:
            memory.clear()


class Memory:
    """Settled values of one run; with `remember`, beside those of earlier runs. Bounded, safe to lose."""

    def __init__(self, remember: bool) -> None:
        self._remember = remember
        self._lock = threading.RLock()
        self._blocks: OrderedDict[Hashable, Block] = OrderedDict()
        self._shelves: dict[Hashable, Shelf] = {}
        self._unread: dict[Hashable, list[tuple[Block, Found]]] = {}
        """(signature, block) -> what has come since the last reading."""

    def get(self, call: AttentionCall) -> Settled | None:
        """Values for `call` that need no probe."""
        if call.sigma is None or (block := self._blocks.get(_form(call))) is None:
            return None
        number = sigma_bin(call.sigma)
        found = block.found.get(number) or self._from_disk(call, block, number)
        return None if found is None else found.settled

    def _from_disk(self, call: AttentionCall, block: Block, number: int) -> Found | None:
        with self._lock:
            row = block.shelf.row(block.number, number, block.latest) if block.ahead else None
            if row is None:
                return None
            block.ahead -= 1
            # The sinks are those that the last probe has found: the same.
            settled = Settled(block.shelf.setting[row], block.found[block.latest].settled.always)
            return self._add(call, block, number, Found(settled, {"density": block.shelf.density[row]}, probed=False))

    def put(self, call: AttentionCall, settled: Settled) -> None:
        """Keep what a probe of `call` has found, where the call's place in a run is known."""
        if call.sigma is None or call.block is None:
            return
        number, form = sigma_bin(call.sigma), _form(call)
        with self._lock, long_lived.allocation():
            own = Settled(settled.setting.clone(), settled.always.clone())
            block = self._blocks.get(form)
            if block is None:
                block = self._blocks[form] = Block(call.block, number, self._shelf(call, number, own))
                if len(self._blocks) > LIMIT:
                    self._blocks.popitem(last=False)
            observed = {"density": own.setting[:, 0].mean()}
            agrees = block.shelf.agrees(block.number, number, own, observed["density"])
            if agrees is None:
                block.agreements = 0
            else:
                observed["remembered"] = agrees
            block.latest, block.ahead = number, 0
            self._add(call, block, number, Found(own, observed, probed=True))

    def _add(self, call: AttentionCall, block: Block, number: int, found: Found) -> Found:
        block.found[number] = found
        self._unread.setdefault((call.signature, call.block), []).append((block, found))
        return found

    def _shelf(self, call: AttentionCall, number: int, settled: Settled) -> Shelf:
        name = (_form(call)[:-1], number)
        if name not in self._shelves:
            self._shelves[name] = Shelf(_key(call, number) if self._remember and cache.is_on() else None, settled)
        return self._shelves[name]

    def observed(self, call: AttentionCall) -> Mapping[str, Tensor]:
        """Scalars on the device. density: mean of the heads; remembered: 1 where a probe agreed with the disk, 0 where it did not."""
        if call.sigma is None or (block := self._blocks.get(_form(call))) is None:
            return {}
        found = block.found.get(sigma_bin(call.sigma))
        return {} if found is None else found.observed

    def read_back(self, signature: Any, number: int | None, observed: Mapping[str, float], counts: bool) -> None:
        """See Backend.read_back."""
        with self._lock:
            for block, found in self._unread.pop((signature, number), ()):
                found.counts = counts
                block.spoiled = block.spoiled or not counts
                if "remembered" in found.observed:
                    block.heard(found, counts and observed.get("remembered") == 1)

    def keep(self) -> None:
        """Store what this run has found and the disk has not."""
        with self._lock:
            for shelf in self._shelves.values():
                shelf.update([block for block in self._blocks.values() if block.shelf is shelf])

    def clear(self) -> None:
        """Forget everything but what is on disk."""
        with self._lock:
            self._blocks.clear()
            self._shelves.clear()
            self._unread.clear()


class Shelf:
    """The disk's values for calls of one form in runs that begin in one sigma bin; none, and nothing is kept, where key is None.

    rows: (block, sigma bin) -> row. setting [rows, heads, 4] and density [rows], the mean of the heads: float32, on the device
    where there are rows.
    The tensors of the file: where [rows, 2] int32, block and sigma bin; setting; sinks: the places in always [heads, blocks] that are 1,
    int32, row after row; sink_count [rows] int32.
    """

    def __init__(self, key: Mapping[str, cache.Scalar] | None, like: Settled) -> None:
        self._key, self._shape = key, like.always.shape
        self._on_cpu = torch.empty(0, self._shape[0], 4)
        self._sinks: list[Tensor] = []
        self.rows: dict[tuple[int, int], int] = {}
        if key is not None and (found := tensor_cache.load(KIND, key)) is not None:
            try:
                self._take(found)
            except (KeyError, ValueError) as error:
                tensor_cache.unusable(KIND, key, error)
        self.setting = _to(like.setting.device, self._on_cpu) if self.rows else self._on_cpu
        self.density = self.setting[..., 0].mean(1)
        self._most = (TOLERANCE * self.setting[..., 0]).clamp(max=ANY_EXACT)
        self._least = self.density / SURPLUS

    def _take(self, found: Mapping[str, Tensor]) -> None:
        """Raises KeyError, ValueError where the file has not what it should."""
        where, setting, sinks, count = (found[name] for name in ("where", "setting", "sinks", "sink_count"))
        rows = len(where) if where.dim() else -1
        if [(x.dtype, x.shape) for x in (where, setting, count)] != [
                (torch.int32, (rows, 2)), (torch.float32, (rows, self._shape[0], 4)), (torch.int32, (rows,))] or \
                sinks.dtype != torch.int32 or sinks.dim() != 1 or bool((count < 0).any()) or int(count.sum()) != len(sinks):
            raise ValueError("tensors of another form")
        density = setting[..., 0]
        if not bool(((setting >= 0) & (setting <= 2)).all() & ((density > 0) & (density <= 1)).all()
                    & ((sinks >= 0) & (sinks < self._shape.numel())).all()):
            raise ValueError("values out of range")
        self._on_cpu, self._sinks = setting, list(sinks.split(count.tolist()))
        self.rows = {(block, number): row for row, (block, number) in enumerate(where.tolist())}

    def row(self, block: int, number: int, like: int) -> int | None:
        """The row of a sigma bin; None where there is none, or where its sinks are not those of the sigma bin `like`."""
        row, other = self.rows.get((block, number)), self.rows.get((block, like))
        return row if row is not None and other is not None and torch.equal(self._sinks[row], self._sinks[other]) else None

    def agrees(self, block: int, number: int, settled: Settled, density: Tensor) -> Tensor | None:
        """Whether a probe, of this mean density, has found what is here: a bool on the device. None where nothing is here."""
        row = self.rows.get((block, number))
        if row is None:
            return None
        sinks = self._sinks[row]
        same = settled.always.sum(dtype=torch.int32) == len(sinks)
        if len(sinks):
            same &= settled.always.flatten()[_to(settled.always.device, sinks.long())].all()
        return same & ((settled.setting[:, 0] > self._most[row]).float().mean() <= STRAY_HEADS) & (density >= self._least[row])

    def update(self, blocks: list[Block]) -> None:
        """Put what the run has found in these blocks on disk, where that is anything new; its values are read from the device at once."""
        if self._key is None:
            return
        gone = {block.number for block in blocks if block.strayed or block.spoiled}
        rows = {place: (self._on_cpu[row], self._sinks[row]) for place, row in self.rows.items() if place[0] not in gone}
        new = [(block.number, number, found.settled) for block in blocks for number, found in block.new()]
        if not new and len(rows) == len(self.rows):
            return
        setting, sinks = _from_device([settled for _, _, settled in new])
        rows |= {(block, number): (one, places) for (block, number, _), one, places in zip(new, setting, sinks, strict=True)
                 if bool(one.isfinite().all())}
        where = sorted(rows)
        tensor_cache.store(KIND, self._key, {
            "where": torch.tensor(where, dtype=torch.int32).view(-1, 2),
            "setting": torch.stack([rows[place][0] for place in where]) if where else self._on_cpu[:0],
            "sinks": torch.cat([torch.empty(0, dtype=torch.int32), *(rows[place][1] for place in where)]),
            "sink_count": torch.tensor([len(rows[place][1]) for place in where], dtype=torch.int32)})


def _form(call: AttentionCall) -> tuple[Any, ...]:
    """What settled values hold for, but for sigma. The block is the last part."""
    return call.signature, call.fingerprint, call.cond_or_uncond, call.target_error, call.scale, call.block


def _key(call: AttentionCall, first: int) -> dict[str, cache.Scalar] | None:
    """What values are filed under on disk; None where the model is not known.

    Wan 2.2 has two models of one kind, one for each half of the noise scale: their runs begin in different sigma bins.
    """
    place = cache.place(call)
    if place is None:
        return None
    mask = "" if call.key_mask is None else "x".join(map(str, call.key_mask.shape))
    return {**place, "grid": _text(call.grid), "key_grid": _text(call.key_grid), "mask": mask, "scale": call.scale,
            "error": call.target_error, "first_head": call.first_head, "first_bin": first,
            "cond_or_uncond": " ".join(map(str, call.cond_or_uncond)), "version": VERSION}


def _text(grid: TokenGrid | None) -> str:
    return "none" if grid is None else f"{grid.t}x{grid.h}x{grid.w} from {grid.start}"


def _to(device: torch.device, x: Tensor) -> Tensor:
    """A copy on `device`, for which the host does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _from_device(found: list[Settled]) -> tuple[list[Tensor], list[Tensor]]:
    """(settings [heads, 4], places of the sinks int32) on the CPU."""
    if not found:
        return [], []
    setting = torch.stack([one.setting for one in found]).cpu()
    sinks: list[Tensor] = []
    for begin in range(0, len(found), AT_ONCE):
        always = torch.stack([one.always.flatten() for one in found[begin : begin + AT_ONCE]])
        row, place = always.nonzero().cpu().unbind(1)
        sinks += place.to(torch.int32).split(torch.bincount(row, minlength=len(always)).tolist())
    return list(setting), sinks
