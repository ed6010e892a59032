"""What near_far has settled in earlier runs: with `remember`, used where a run's own probes agree with it, and never a reason to fail."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import fake_comfy
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from taylor_patch import cache, tensor_cache
from taylor_patch import engine as engines
from taylor_patch.backends.near_far import NearFar, NearFarOptions, aim, reference, remembered
from taylor_patch.backends.targets import sigma_bin
from taylor_patch.call import AttentionCall, TokenGrid
from taylor_patch.cli import main
from taylor_patch.demo import host as demo
from taylor_patch.demo import model as demo_model
from taylor_patch.hooks.attention import _prompts, replace
from taylor_patch.run import current_run
from tests.test_error_aimed import AUTO, HEADS, SIDE, TEXT, qkv
from tests.test_faults import InterruptProcessingException, full, read_only

REMEMBER = AUTO + "[backends.near_far]\nremember = true\n"
BLOCKS = 2
SIGMAS = (*(number / (16 - number) for number in (8, 7, 6, 5, 4, 3, 2, 1)), 0.0)
"""One for each of eight sigma bins, 8 to 1, and the end."""
BINS = [sigma_bin(sigma * 1.0001) for sigma in SIGMAS[:-1]]
LEARNT = [8, 7, 5, 2]
"""Bins that are probed where the disk agrees all along: the first; one, then one; one, then two; one, then two."""


@pytest.fixture(autouse=True)
def known_model(monkeypatch, configure):
    """The stand-in's model has a fingerprint; near_far remembers."""
    monkeypatch.setattr(fake_comfy.Diffusion, "named_parameters", lambda self: [("weight", torch.zeros(3))], raising=False)
    configure(REMEMBER)
    yield
    cache.switch(True)


@pytest.fixture
def probes(monkeypatch):
    """(block, sigma bin) of every call that was probed."""
    seen = []
    original = reference.attend_aimed

    def attend_aimed(call, settled):
        if settled is None:
            seen.append((call.block, sigma_bin(call.sigma)))
        return original(call, settled)

    monkeypatch.setattr(reference, "attend_aimed", attend_aimed)
    return seen


def sample(comfy, inputs, sigmas=SIGMAS, calls=1, before=lambda sigma: None):
    """Outputs of all calls of a run. inputs: q, k, v [1, N, HEADS * DIM], or what makes them from sigma. Each block is called `calls` times."""
    outs = []

    def body(options):
        sigma = float(options["sigmas"])
        before(sigma)
        given = inputs(sigma) if callable(inputs) else inputs
        for _ in range(calls):
            outs.extend(comfy.attention.optimized_attention(*given, HEADS, transformer_options={**options, "block_index": block})
                        for block in range(BLOCKS))
        return options["sigmas"]

    comfy.sample(body, sigmas=[sigma * 1.0001 for sigma in sigmas], latent=(1, 16, 2 * SIDE, 2 * SIDE))
    return outs


def bins(probes, block=0):
    found = [number for where, number in probes if where == block]
    probes[:] = [one for one in probes if one[0] != block]
    return found


def kept():
    """(block, sigma bin) of every value on disk."""
    found = []
    for file in tensor_cache.folder().glob("*"):
        found += map(tuple, torch.load(file, weights_only=True)["tensors"]["where"].tolist())
    return sorted(found)


def errors(outs, inputs):
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in inputs)
    exact = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return [float((out - exact).norm() / exact.norm()) for out in outs]


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def test_the_next_run_probes_less_and_gives_the_same_bits(comfy, probes):
    first = sample(comfy, qkv(0.1))
    assert bins(probes) == bins(probes, 1) == BINS and kept() == sorted((block, number) for block in range(BLOCKS) for number in BINS)
    before = [file.read_bytes() for file in tensor_cache.folder().glob("*")]
    second = sample(comfy, qkv(0.1))
    assert bins(probes) == bins(probes, 1) == LEARNT
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [file.read_bytes() for file in tensor_cache.folder().glob("*")] == before


def test_a_lora_is_found_out(comfy, probes):
    """The model's weights, and so q, k and v, are others; its fingerprint is not."""
    easy, hard = qkv(0.02), qkv(0.6)
    sample(comfy, easy)
    probes.clear()
    outs = sample(comfy, hard)
    assert bins(probes) == bins(probes, 1) == BINS and max(errors(outs, hard)) < 0.1
    again = sample(comfy, hard)
    assert bins(probes) == LEARNT, "the disk has the new weights' values now"
    assert all(torch.equal(a, b) for a, b in zip(outs, again, strict=True))


def test_values_of_the_kernels(comfy, monkeypatch):
    """In Triton's interpreter where there is no GPU; few tokens, since it is slow."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from taylor_patch.backends.near_far import op

    seen = []
    monkeypatch.setattr(reference, "attend_aimed", lambda call, settled: (seen.append(settled), op.attend_aimed(call, settled))[1])
    inputs = [x[:, TEXT : TEXT + 8 * SIDE] for x in qkv(0.02)]

    def body(options):
        return comfy.attention.optimized_attention(*inputs, HEADS, transformer_options={**options, "block_index": 0})

    first, again = (comfy.sample(body, sigmas=[*(sigma * 1.0001 for sigma in SIGMAS[:3]), 0.0], latent=(1, 16, 16, 2 * SIDE)) for _ in range(2))
    assert [settled is None for settled in seen] == [True, True, True, True, True, False]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_lora_that_shows_late_is_found_out_by_the_next_probe(comfy, probes):
    """It changes nothing down to bin 6."""
    easy, hard = qkv(0.02), qkv(0.6)
    sample(comfy, easy)
    probes.clear()
    outs = sample(comfy, lambda sigma: easy if sigma_bin(sigma) >= 6 else hard)
    assert bins(probes) == [8, 7, 5, 4, 3, 2, 1]
    assert max(errors(outs[3 * BLOCKS :], hard)) < 0.1
    probes.clear()
    # The block's values on disk are this run's, those that came from the disk are gone.
    assert (0, 6) not in kept() and (0, 5) in kept()


def test_values_that_are_denser_than_needed_are_not_used(comfy, probes):
    easy, hard = qkv(0.02), qkv(0.6)
    sample(comfy, hard)
    probes.clear()
    sample(comfy, easy)
    assert bins(probes) == BINS


def test_noise_is_no_evidence(comfy, probes):
    """The first bin agrees, the others do not: none comes from the disk."""
    easy, hard = qkv(0.02), qkv(0.6)
    sample(comfy, easy)
    probes.clear()
    outs = sample(comfy, lambda sigma: easy if sigma_bin(sigma) == 8 else hard)
    assert bins(probes) == BINS and max(errors(outs[BLOCKS:], hard)) < 0.1


def test_bins_that_the_disk_does_not_have_are_added(comfy, probes):
    sample(comfy, qkv(0.1), (*SIGMAS[:3], 0.0))
    assert Counter(block for block, _ in kept()) == {0: 3, 1: 3}
    probes.clear()
    sample(comfy, qkv(0.1))
    assert bins(probes) == [8, 7, 5, 4, 3, 2, 1] and len(kept()) == BLOCKS * len(BINS)


def test_a_run_that_begins_elsewhere_has_values_of_its_own(comfy, probes):
    """As the two models of Wan 2.2 have, which share a fingerprint."""
    sample(comfy, qkv(0.02))
    probes.clear()
    sample(comfy, qkv(0.6), SIGMAS[3:])
    assert bins(probes) == BINS[3:] and len(os.listdir(tensor_cache.folder())) == 2
    probes.clear()
    sample(comfy, qkv(0.02))
    assert bins(probes) == LEARNT


def test_several_calls_of_a_block_in_an_evaluation(comfy, probes):
    """Context windows: the first call stands for all, as it does without the disk."""
    sample(comfy, qkv(0.1), calls=3)
    assert bins(probes) == bins(probes, 1) == BINS
    sample(comfy, qkv(0.1), calls=3)
    assert bins(probes) == bins(probes, 1) == LEARNT


FEW = (*SIGMAS[:3], 0.0)
"""Three sigma bins."""


def equal(some, others):
    return len(some) == len(others) and all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_two_runs_at_once_share_nothing(comfy):
    """Other values in calls of the same form, a step of each in turn: what each gives alone, and a whole file afterwards."""
    inputs, alone = {"easy": qkv(0.02), "hard": qkv(0.6)}, {}
    for name, given in inputs.items():
        alone[name] = sample(comfy, given, FEW)
        tensor_cache.clear()
    turn = {"easy": threading.Semaphore(1), "hard": threading.Semaphore(0)}

    def in_turn(name, other):
        def before(sigma):
            if sigma < SIGMAS[0]:
                turn[other].release()
            assert turn[name].acquire(timeout=60)

        try:
            return sample(comfy, inputs[name], FEW, before=before)
        finally:
            turn[other].release()

    with ThreadPoolExecutor(2) as pool:
        running = {name: pool.submit(in_turn, name, other) for name, other in (("easy", "hard"), ("hard", "easy"))}
        outs = {name: future.result(120) for name, future in running.items()}
    assert all(equal(outs[name], alone[name]) and max(errors(outs[name], inputs[name])) < 0.1 for name in inputs)
    assert kept() == sorted((block, number) for block in range(BLOCKS) for number in BINS[:3])


def test_a_run_inside_a_run_leaves_its_values_alone(comfy, probes):
    """A node that samples inside a callback, in the middle of a sigma bin, which it meets with other values."""
    easy, hard, sigmas = qkv(0.02), qkv(0.6), (0.9, 0.8, 0.0)
    alone = sample(comfy, easy, sigmas)
    tensor_cache.clear()
    probes.clear()
    inner = []
    outs = sample(comfy, easy, sigmas, before=lambda sigma: sigma < 0.85 and inner.extend(sample(comfy, hard, sigmas)))
    assert equal(outs, alone) and max(errors(inner, hard)) < 0.1
    assert probes == [(block, 7) for block in (0, 1, 0, 1)], "a bin is probed once in each of the two runs"


def test_what_is_settled_goes_with_its_run(comfy):
    found = []
    sample(comfy, qkv(0.1), FEW, before=lambda sigma: found.extend(weakref.ref(one) for one in current_run().memo.values()))
    assert len(found) == 2 and not any(one() for one in found)


def sample_prompts(comfy, inputs):
    """inputs: cond_or_uncond -> q, k, v. Each step has an evaluation for each of them; cond_or_uncond -> outputs of all calls."""
    outs = {prompts: [] for prompts in inputs}

    def body(options):
        prompts = tuple(options["cond_or_uncond"])
        outs[prompts].extend(comfy.attention.optimized_attention(*inputs[prompts], HEADS, transformer_options={**options, "block_index": block})
                             for block in range(BLOCKS))

    def sampler(model, x, sigma, options):
        for prompts in inputs:
            model.apply_model(x, sigma, transformer_options={**options, "cond_or_uncond": list(prompts)})
        return x

    guider = comfy.samplers.CFGGuider(comfy.model_base.Flux(fake_comfy.Diffusion(body)))
    guider.outer_sample(torch.zeros(1, 16, 2 * SIDE, 2 * SIDE), None, sampler, torch.tensor(FEW) * 1.0001)
    return outs


def test_prompts_that_are_evaluated_apart_share_nothing(comfy, probes):
    """Neither within the run nor on disk."""
    inputs = {(0,): qkv(0.02), (1,): qkv(0.6)}
    alone = {prompts: sample_prompts(comfy, {prompts: inputs[prompts]})[prompts] for prompts in inputs}
    tensor_cache.clear()
    probes.clear()
    outs = sample_prompts(comfy, inputs)
    assert all(equal(outs[prompts], alone[prompts]) for prompts in inputs)
    assert bins(probes) == [number for number in BINS[:3] for _ in inputs] and len(os.listdir(tensor_cache.folder())) == 2
    probes.clear()
    again = sample_prompts(comfy, inputs)
    assert bins(probes) == [number for number in LEARNT[:2] for _ in inputs] and all(equal(outs[prompts], again[prompts]) for prompts in inputs)


def test_prompts_as_comfyui_numbers_them():
    assert [_prompts({"cond_or_uncond": found} if found else {}) for found in ([1, 0], (0,), None, ["a"], [[0]], torch.zeros(1), "01")] == [
        (1, 0), (0,), (), (), (), (), ()]


def test_release_forgets_what_all_runs_in_progress_have_settled(probes):
    """And the next call is probed again. Outside a run every call is."""
    backend, memos = NearFar(NearFarOptions()), ({}, {}, None)
    for memo in memos:
        call = dataclasses.replace(call_of(HEADS, 0, 1.0001), memo=memo)
        backend.run(call)
        backend.run(call)
        assert (backend.observed(call) == {}) is (memo is None)
    assert probes == [(0, 8)] * 4
    backend.release()
    for memo in memos[:2]:
        call = dataclasses.replace(call_of(HEADS, 0, 1.0001), memo=memo)
        assert backend.observed(call) == {}
        backend.run(call)
        assert float(backend.observed(call)["density"]) > 0
    assert len(probes) == 6


def test_an_interrupted_run_leaves_what_came_to_its_end(comfy, probes):
    def stop(sigma):
        if sigma_bin(sigma) == 6:
            raise InterruptProcessingException

    with pytest.raises(InterruptProcessingException):
        sample(comfy, qkv(0.1), before=stop)
    assert kept() == [(0, 7), (0, 8), (1, 7), (1, 8)]


def test_what_was_not_read_back_is_not_stored(comfy, monkeypatch):
    """Interrupted within the third evaluation, between block 0 and block 1."""
    original = reference.attend_aimed

    def attend_aimed(call, settled):
        if (call.block, sigma_bin(call.sigma)) == (1, 6):
            raise InterruptProcessingException
        return original(call, settled)

    monkeypatch.setattr(reference, "attend_aimed", attend_aimed)
    with pytest.raises(InterruptProcessingException):
        sample(comfy, qkv(0.1))
    assert kept() == [(0, 7), (0, 8), (1, 7), (1, 8)]


def test_a_run_with_values_that_are_not_finite_leaves_nothing(comfy):
    bad = [x.clone() for x in qkv(0.1)]
    bad[0][:, 100] = torch.nan
    sample(comfy, lambda sigma: bad if sigma_bin(sigma) == 3 else qkv(0.1))
    assert kept() == [] and engines.current().last_run.outcome == "finished"


@pytest.mark.parametrize("later", [False, True], ids=["at once", "at the evaluation's end"])
def test_a_block_whose_sampled_error_was_above_the_limit_leaves_nothing(comfy, configure, monkeypatch, later):
    sample(comfy, qkv(0.1))
    assert len(kept()) == BLOCKS * len(BINS)
    configure(REMEMBER.replace("quality_limit = 0", "quality_limit = 2"))
    monkeypatch.setattr(engines, "checks_later", lambda device: later)
    original = reference.attend_aimed

    def attend_aimed(call, settled):
        out, found = original(call, settled)
        return (1.5 * out if call.block == 1 else out), found

    monkeypatch.setattr(reference, "attend_aimed", attend_aimed)
    sample(comfy, qkv(0.1))
    assert {block for block, _ in kept()} == {0}


def test_nothing_is_stored_without_a_fingerprint_or_in_a_graph(comfy, monkeypatch):
    original = reference.attend_aimed
    monkeypatch.setattr(reference, "attend_aimed", lambda call, settled: (original(call, settled)[0], None))  # as in a graph
    sample(comfy, qkv(0.1))
    assert kept() == []
    monkeypatch.setattr(reference, "attend_aimed", original)
    monkeypatch.delattr(fake_comfy.Diffusion, "named_parameters")
    sample(comfy, qkv(0.1))
    assert kept() == []


def test_without_the_option_nothing_is_read_or_written(comfy, configure, monkeypatch, probes):
    """A run is what it would be on an empty disk, whatever ran before; not one tensor is made on the device for the disk's sake."""
    sample(comfy, qkv(0.02))
    before = [(file, file.read_bytes()) for file in tensor_cache.folder().iterdir()]
    configure(AUTO)
    for name in ("load", "store"):
        monkeypatch.setattr(tensor_cache, name, lambda *args: pytest.fail("the disk was asked"))
    monkeypatch.setattr(remembered, "_to", lambda *args: pytest.fail("a copy to the device"))
    outs = []
    for _ in range(2):
        probes.clear()
        outs.append(sample(comfy, qkv(0.1)))
        assert bins(probes) == bins(probes, 1) == BINS
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    assert [(file, file.read_bytes()) for file in tensor_cache.folder().iterdir()] == before


def test_off_leaves_the_files_alone(comfy, configure, probes):
    sample(comfy, qkv(0.1))
    before = kept()
    configure(REMEMBER.replace("quality =", "cache = false\nquality ="))
    probes.clear()
    sample(comfy, qkv(0.1))
    assert bins(probes) == BINS
    sample(comfy, qkv(0.6))
    assert kept() == before


def replaced(**tensors):
    """The file's content with other tensors."""
    (file,) = tensor_cache.folder().iterdir()
    data = torch.load(file, weights_only=True)
    data["tensors"] |= tensors
    torch.save(data, file)


def change(name):
    """A fault of the one file."""
    (file,) = tensor_cache.folder().iterdir()
    content = file.read_bytes()
    rows = len(kept())
    {"empty": lambda: file.write_bytes(b""),
     "half": lambda: file.write_bytes(content[: len(content) // 2]),
     "other bytes": lambda: file.write_bytes(os.urandom(1000)),
     "a folder": lambda: (file.unlink(), file.mkdir()),
     "another version": lambda: torch.save({"version": 99}, file),
     "no dictionary": lambda: torch.save([1, 2], file),
     "another model's": lambda: torch.save({**torch.load(file, weights_only=True), "name": "other"}, file),
     "no tensors": lambda: torch.save({**torch.load(file, weights_only=True), "tensors": {}}, file),
     "values that are none": lambda: replaced(setting=torch.full((rows, HEADS, 4), torch.nan)),
     "densities out of range": lambda: replaced(setting=torch.full((rows, HEADS, 4), 1.5)),
     "other heads": lambda: replaced(setting=torch.ones(rows, HEADS + 1, 4)),
     "sinks out of range": lambda: replaced(sinks=torch.full((rows,), 10**6, dtype=torch.int32),
                                            sink_count=torch.ones(rows, dtype=torch.int32)),
     "sinks that do not add up": lambda: replaced(sink_count=torch.ones(rows, dtype=torch.int32)),
     "too few rows": lambda: replaced(where=torch.zeros(1, 2, dtype=torch.int32))}[name]()


@pytest.mark.parametrize("fault", ["empty", "half", "other bytes", "a folder", "another version", "no dictionary", "another model's",
                                   "no tensors", "values that are none", "densities out of range", "other heads", "sinks out of range",
                                   "sinks that do not add up", "too few rows"])
def test_a_file_that_cannot_be_used_costs_one_line(comfy, probes, caplog, fault):
    first = sample(comfy, qkv(0.1))
    change(fault)
    probes.clear()
    outs = sample(comfy, qkv(0.1))
    assert bins(probes) == BINS and all(torch.equal(a, b) for a, b in zip(outs, first, strict=True))
    assert "is not used" in warnings(caplog)[0] and len(warnings(caplog)) == (2 if fault == "a folder" else 1)
    if fault != "a folder":
        probes.clear()
        sample(comfy, qkv(0.1))
        assert bins(probes) == LEARNT and len(warnings(caplog)) == 1, "it was written anew"


@pytest.mark.parametrize("disk", [full, read_only], ids=["full", "read-only"])
@pytest.mark.parametrize("step", ["mkstemp", "replace"])
def test_a_bad_disk_costs_one_line(comfy, monkeypatch, caplog, disk, step):
    monkeypatch.setattr(*((tempfile, "mkstemp") if step == "mkstemp" else (os, "replace")), disk)
    for _ in range(3):
        sample(comfy, qkv(0.1))
    assert engines.current().last_run.outcome == "finished" and kept() == []
    assert len(warnings(caplog)) == 1 and "cannot be written" in warnings(caplog)[0]


def test_a_folder_that_is_removed_in_mid_run(comfy, probes):
    sample(comfy, qkv(0.1))
    probes.clear()
    sample(comfy, qkv(0.1), before=lambda sigma: sigma < 1 and tensor_cache.clear())
    assert bins(probes) == LEARNT and kept() == [], "agreeing values are not written again"
    probes.clear()
    sample(comfy, qkv(0.1))
    assert bins(probes) == BINS


def test_the_folder_is_bounded_and_what_was_not_used_for_longest_goes(monkeypatch):
    tensor = {"x": torch.arange(1000)}
    tensor_cache.store("kind", {"n": 0}, tensor)
    monkeypatch.setattr(tensor_cache, "LIMIT", int(3.5 * tensor_cache.nbytes()))
    (tensor_cache.folder() / "near_far-left-by-a-dead-process").write_bytes(b"x" * 100)
    for number in range(1, 6):
        for file in tensor_cache.folder().iterdir():
            os.utime(file, ns=(0, file.stat().st_mtime_ns - 10**9))
        assert torch.equal(tensor_cache.load("kind", {"n": 0})["x"], tensor["x"])
        tensor_cache.store("kind", {"n": number}, tensor)
    assert [n for n in range(6) if tensor_cache.load("kind", {"n": n})] == [0, 4, 5]
    assert tensor_cache.kinds() == {"kind": 3} and tensor_cache.nbytes() <= tensor_cache.LIMIT
    tensor_cache.store("kind", {"n": 9}, {"x": torch.zeros(10 * tensor_cache.LIMIT, dtype=torch.uint8)})
    assert tensor_cache.load("kind", {"n": 9}) is None and tensor_cache.kinds() == {"kind": 3}


def test_the_command_knows_both(comfy):
    sample(comfy, qkv(0.1))
    cache.store("tune", {"model": "Flux"}, {"power": 0.5})
    shown = CliRunner().invoke(main, ["cache"])
    assert "near_far 1" in shown.output and "tune 1" in shown.output and str(cache.path()) in shown.output, shown.output
    assert str(tensor_cache.folder()) in shown.output
    cleared = CliRunner().invoke(main, ["cache", "--clear"])
    assert cleared.exit_code == 0 and cleared.output.startswith("Removed") and not tensor_cache.folder().exists() and not cache.path().exists()
    assert "no entries" in CliRunner().invoke(main, ["cache"]).output


def call_of(heads, block, sigma):
    q = torch.zeros(1, heads, 1024, 16)
    return AttentionCall(q, q, q, 0.25, grid=TokenGrid(1, 32, 32), sigma=sigma, block=block, fingerprint="Flux-1")


@pytest.mark.parametrize("grid", [None, TokenGrid(1, 32, 32)], ids=["queries in a line", "queries in a grid"])
def test_cross_attention_is_kept_apart_by_both_grids(grid):
    """Also where the queries have none: settings found with the keys in tiles say nothing about the same keys in a line."""
    def memory_of(key_grid):
        """Has seen one probe; and what it says of the disk."""
        keys = torch.zeros(1, 2, 2304, 16)
        call = AttentionCall(torch.zeros(1, 2, 1024, 16), keys, keys, 0.25, grid=grid, key_grid=key_grid, sigma=1.0, block=0,
                             fingerprint="Wan-1")
        memory = remembered.Memory(remember=True)
        memory.put(call, aim.Settled(torch.full((2, 4), 0.1), torch.zeros(2, 36, dtype=torch.int8)))
        observed = {name: float(x) for name, x in memory.observed(call).items()}
        memory.read_back(call.signature, 0, observed, True)
        return memory, observed.get("remembered")

    for key_grid in (None, TokenGrid(1, 48, 48)):
        memory, before = memory_of(key_grid)
        memory.keep()
        assert (before, memory_of(key_grid)[1]) == (None, 1)
    assert len(list(tensor_cache.folder().iterdir())) == 2


def test_settings_and_sinks_come_back_as_they_were():
    """Bit by bit, where no head has a sink too; and a bin whose sinks are others is not taken."""
    found = {number: aim.Settled(torch.rand(40, 4) * 0.5 + 0.01, (torch.rand(40, 16) < 0.05).to(torch.int8)) for number in (8, 7, 6, 5)}
    found[7].always.zero_()
    found[6] = aim.Settled(found[6].setting, found[7].always)
    sigmas = dict(zip(BINS, SIGMAS, strict=False))
    memories = [remembered.Memory(remember=True) for _ in range(2)]
    for memory in memories:
        for number, one in found.items():
            call = call_of(40, 3, sigmas[number] * 1.0001)
            known = memory.get(call)
            if memory is memories[1] and number == 6:
                assert torch.equal(known.setting, one.setting) and torch.equal(known.always, one.always)
            else:
                assert known is None
                memory.put(call, one)
            memory.read_back(call.signature, 3, {name: float(x) for name, x in memory.observed(call).items()}, True)
        memory.keep()
        assert tensor_cache.nbytes() < 40_000
    last = remembered.Memory(remember=True)
    for number in (8, 7):
        call = call_of(40, 3, sigmas[number] * 1.0001)
        last.put(call, aim.Settled(found[number].setting, 1 - found[number].always))
        assert float(last.observed(call)["remembered"]) == 0, "other sinks"


def test_a_video_model_of_forty_blocks_weighs_little():
    memory, always = remembered.Memory(remember=True), torch.zeros(40, 1600, dtype=torch.int8)
    always[:, 7] = 1
    for number in range(16):
        for block in range(40):
            call = call_of(40, block, (number + 0.001) / (16 - number))
            memory.put(call, aim.Settled(torch.full((40, 4), 0.1), always))
            memory.read_back(call.signature, block, {}, True)
    memory.keep()
    assert len(kept()) == 640 and tensor_cache.nbytes() < 1 << 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_host_never_waits_for_the_disks_values():
    """Storing, loading, comparing and using them; what is read is read between the calls."""
    generator = torch.Generator().manual_seed(0)
    low = F.interpolate(torch.randn(24, 64, 16, 16, generator=generator), (64, 64), mode="bilinear").view(1, 8, 3, 64, -1).transpose(3, 4)
    q, k, v = (x.to("cuda", torch.bfloat16) for x in (low + 0.1 * torch.randn(low.shape, generator=generator)).unbind(2))
    backend, taken = NearFar(NearFarOptions(remember=True)), []
    for memo in ({}, {}):
        for sigma in SIGMAS[:3]:
            call = AttentionCall(q, k, v, 0.06, grid=TokenGrid(1, 64, 64), sigma=sigma * 1.0001, block=0, fingerprint="Flux-1",
                                 target_error=0.1, memo=memo)
            torch.cuda.set_sync_debug_mode("error" if sigma != SIGMAS[0] or taken else "default")  # the first call compiles
            try:
                backend.run(call)
                observed = backend.observed(call)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            taken.append("remembered" in observed)
            backend.read_back(call.signature, 0, {name: float(x) for name, x in observed.items()}, True, memo)
        backend.keep(memo)
    assert taken == [False, False, False, True, True, False] and len(kept()) == 3


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """(first picture's run, another picture's with an empty folder, the same with what the first one left): probes, errors."""
    folder, found = tmp_path_factory.mktemp("drawn"), {}
    network, texts, vectors = demo_model.load(torch.device("cpu"))
    original, count = reference.attend_aimed, Counter()

    def attend_aimed(call, settled):
        count["probes"] += settled is None
        return original(call, settled)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "attend_aimed", attend_aimed)
        for name, home, picture in (("first", "a", 17), ("alone", "b", 3), ("remembered", "a", 3)):
            patch.setenv("XDG_CACHE_HOME", str(folder / home))
            engine = engines.Engine({"taylor_patch": {"backend": "near_far", "quality": 0.05, "quality_limit": 0.0},
                                     "backends": {"near_far": {"remember": True}}}, environ={})
            engines.use(engine)
            at, attention, all_errors = slice(picture, picture + 1), replace(demo.exact_attention), []

            def watched(q, k, v, heads, attention=attention, all_errors=all_errors, **kwargs):
                out, exact = attention(q, k, v, heads, **kwargs), demo.exact_attention(q, k, v, heads)
                all_errors.append(float((out - exact).norm() / exact.norm()))
                return out

            count.clear()
            demo.sample(demo.Flux(network), texts[at], vectors[at], 128, 8, 0, engine, watched, lambda: None)
            found[name] = count["probes"], torch.tensor([error for error in all_errors if error > 1e-5])
    engines.reset()
    return found


def test_another_picture_of_the_trained_model_meets_its_error(drawn):
    """Over all steps and calls; those that were exact are left out."""
    assert drawn["remembered"][0] < drawn["alone"][0], drawn
    alone, after = (float(drawn[name][1].quantile(0.9)) for name in ("alone", "remembered"))
    assert after < 0.05 and after < 1.05 * alone, (alone, after)
