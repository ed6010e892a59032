"""Where the image tokens are, and where in the run a call is."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from taylor_patch.call import TokenGrid
from taylor_patch.families import layout
from taylor_patch.grid import UNET_STRIDES, infer, infer_all, patch_sizes
from taylor_patch.run import Evaluation, SamplingRun, current_evaluation, current_run, describe, evaluation, sampling_run

P2 = ((1, 2, 2),)
UNET = tuple((1, s, s) for s in UNET_STRIDES)
IMAGE = (1, 16, 32, 48)  # 16 x 24 tokens of patch 2

CASES = {
    "flux-text-first": ((384 + 10, IMAGE, P2, "Flux", False, {}), TokenGrid(1, 16, 24, 10)),
    "flux-img_slice": ((384 + 10, IMAGE, P2, "Flux", False, {"img_slice": [10, 394]}), TokenGrid(1, 16, 24, 10)),
    "img_slice-image-first": ((384 + 10, IMAGE, P2, "HunyuanVideo", False, {"img_slice": [0, 384]}), TokenGrid(1, 16, 24, 0)),
    "img_slice-with-text-after": ((400, IMAGE, P2, "Other", False, {"img_slice": [6, 390]}), TokenGrid(1, 16, 24, 6)),
    "img_slice-of-other-length": ((400, IMAGE, P2, "Flux", False, {"img_slice": [6, 400]}), "does not follow"),
    "img_slice-past-the-end": ((384, (1, 16, 32, 32), P2, "Flux", False, {"img_slice": [200, 456]}), "does not follow"),
    "image-only": ((384, IMAGE, P2, "Anything", False, {}), TokenGrid(1, 16, 24)),
    "unknown-family": ((394, IMAGE, P2, "Other", False, {}), "unknown: token count does not follow"),
    "too-few-tokens": ((300, IMAGE, P2, "Flux", False, {}), "fewer tokens than the image has"),
    "odd-latent-is-padded": ((17 * 24, (1, 16, 33, 47), P2, "Flux", False, {}), TokenGrid(1, 17, 24)),
    "wan": ((5 * 8 * 12, (1, 16, 5, 16, 24), P2, "WAN21", False, {}), TokenGrid(5, 8, 12)),
    "video-patch": ((3 * 8 * 12, (1, 16, 5, 16, 24), ((2, 2, 2),), "X", False, {}), TokenGrid(3, 8, 12)),
    "unet-full": ((32 * 48, IMAGE, UNET, "SDXL", False, {}), TokenGrid(1, 32, 48)),
    "unet-2": ((16 * 24, IMAGE, UNET, "SDXL", False, {}), TokenGrid(1, 16, 24)),
    "unet-4": ((8 * 12, IMAGE, UNET, "SDXL", False, {}), TokenGrid(1, 8, 12)),
    "unet-other": ((100, IMAGE, UNET, "SDXL", False, {}), "does not follow"),
    "reference": ((394, IMAGE, P2, "Flux", True, {}), "reference"),
    "reference-count": ((394, IMAGE, P2, "Flux", False, {"reference_image_num_tokens": [10]}), "reference"),
    "no-latent": ((394, None, P2, "Flux", False, {}), "no image or video latent"),
    "audio-latent": ((394, (1, 8, 394), P2, "X", False, {}), "no image or video latent"),
}


@pytest.mark.parametrize("case", CASES)
def test_infer(case):
    (tokens, latent, patches, family, *rest), expected = CASES[case]
    found, reason = infer(tokens, latent, patches, layout(family, None), *rest)
    if isinstance(expected, TokenGrid):
        assert found == expected and reason == ""
    else:
        assert found is None and expected in reason


@pytest.mark.parametrize(("tokens", "expected"), [
    (384, TokenGrid(1, 16, 24)), (394, None), (300, None), (4096, None),
])
def test_a_side_of_cross_attention_has_a_grid_where_it_is_the_image_and_nothing_else(tokens, expected):
    assert infer_all(tokens, IMAGE, P2, layout("Flux", None), False, {}) == expected


@pytest.mark.parametrize(("size", "expected"), [
    (2, P2), ((1, 2, 2), P2), ([2, 2], P2), (None, UNET), ("2", UNET), ((2.0, 2.0), UNET),
], ids=str)
def test_patch_sizes(size, expected):
    assert patch_sizes(SimpleNamespace(patch_size=size)) == expected


def test_patch_sizes_of_a_model_that_states_none():
    assert patch_sizes(object()) == UNET == patch_sizes(None)


@pytest.mark.parametrize(("sigma", "step"), [
    (4.0, 0), (4.0001, 0), (3.0, 1), (2.5, 1), (1.0, 3), (0.5, 3), (9.0, None), (3.0001, 1),
], ids=str)
def test_step_of(sigma, step):
    assert SamplingRun((4.0, 3.0, 2.0, 1.0, 0.0)).step_of(sigma) == step


@pytest.mark.parametrize("schedule", [(), (1.0,)], ids=["empty", "one"])
def test_step_of_without_steps(schedule):
    assert SamplingRun(schedule).step_of(1.0) is None


def fresh(double=0, calls=1):
    return Evaluation(SamplingRun(), None, None, None, None, P2, double_blocks=double, calls=calls)


def test_block_index_counts_calls_where_the_model_gives_none():
    assert [fresh(calls=n).block_index({}) for n in (1, 2, 3)] == [0, 1, 2]
    assert fresh(calls=4).block_index({"block_index": 0, "block": ("input", 4)}) == 3


def test_block_index_of_single_blocks_follows_the_double_ones():
    e = fresh(double=19, calls=3)
    assert e.block_index({"block_index": 4, "block_type": "double"}) == 4
    assert e.block_index({"block_index": 4, "block_type": "single"}) == 23
    assert e.block_index({}) == 2


def test_evaluation_reads_the_model():
    model = SimpleNamespace(diffusion_model=SimpleNamespace(patch_size=2, double_blocks=[0] * 5))
    with sampling_run([2.0, 1.0, 0.0]) as run:
        with evaluation(describe(run, model, IMAGE, 1.0)) as e:
            assert current_evaluation() is e
            assert (e.step, e.patches, e.double_blocks, e.family, e.latent_shape) == (1, P2, 5, "SimpleNamespace", IMAGE)
        assert current_evaluation() is None and run.evaluations == 1
    assert run.summary("finished").steps == 2 and run.summary("finished").evaluations == 1


def test_runs_nest_and_close_after_exceptions():
    assert current_run() is None
    with sampling_run([1.0]) as outer:
        with pytest.raises(KeyError), sampling_run([2.0]) as inner:
            assert current_run() is inner
            raise KeyError
        assert current_run() is outer
    assert current_run() is None


def in_thread(work):
    result = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    thread.join(10)
    return result[0]


def test_worker_thread_sees_the_open_run_but_not_the_evaluation():
    model = SimpleNamespace(diffusion_model=None)
    with sampling_run([1.0]) as run, evaluation(describe(run, model, None, None)):
        assert in_thread(current_run) is run and in_thread(current_evaluation) is None
    assert in_thread(current_run) is None


def test_two_threads_have_their_own_runs():
    barrier, seen = threading.Barrier(2, timeout=10), {}

    def work(number):
        with sampling_run([float(number)]) as run:
            barrier.wait()
            seen[number] = current_run() is run
            barrier.wait()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert seen == {0: True, 1: True} and current_run() is None
