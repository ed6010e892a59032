"""What runs have settled, on disk: kept, bounded, and never a reason to fail."""

from __future__ import annotations

import json
import os
import threading

import pytest
import torch
from click.testing import CliRunner

from taylor_patch import cache, calibration
from taylor_patch import engine as engines
from taylor_patch.call import AttentionCall
from taylor_patch.cli import main
from taylor_patch.run import fingerprint_of

KEY = {"model": "Flux-1", "tokens": 4096, "sigma": 0.5}


@pytest.fixture(autouse=True)
def on():
    cache.switch(True)
    yield
    cache.switch(True)


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


def test_what_is_stored_is_loaded():
    assert cache.load("tune", KEY) is None
    cache.store("tune", KEY, {"power": 0.5, "names": ["a"]})
    cache.store("density", KEY, {"density": 0.1})
    cache.store("tune", {**KEY, "tokens": 1024}, {"power": 0.1})
    cache.store("tune", KEY, {"power": 0.75, "names": ["b"]})
    found = cache.load("tune", dict(reversed(KEY.items())))
    assert found == {"power": 0.75, "names": ["b"]} and cache.load("density", KEY) == {"density": 0.1}
    found["names"].append("c")
    assert cache.load("tune", KEY)["names"] == ["b"]
    assert cache.kinds() == {"tune": 2, "density": 1} and os.listdir(cache.path().parent) == ["settled.json"]
    assert cache.clear() == 3 and cache.load("tune", KEY) is None and cache.clear() == 0


def test_the_oldest_go_first(monkeypatch):
    monkeypatch.setattr(cache, "LIMIT", 5)
    for number in range(8):
        cache.store("tune", {"number": number}, {"value": number})
        if number == 5:
            cache.store("tune", {"number": 2}, {"value": 2})
    assert [n for n in range(8) if cache.load("tune", {"number": n})] == [2, 4, 5, 6, 7]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 100_000, "\x00\xff", '{"version": 99, "entries": []}',
                                     '{"version": 1}', '{"version": 1, "entries": [1]}',
                                     '{"version": 1, "entries": [{"kind": "tune", "key": 1, "value": 2}]}'])
def test_a_file_that_is_no_cache_costs_one_line(content, caplog):
    cache.path().parent.mkdir(parents=True)
    cache.path().write_text(content, encoding="latin-1")
    assert [cache.load("tune", KEY) for _ in range(3)] == [None] * 3
    assert len(warnings(caplog)) == 1 and "is not used" in warnings(caplog)[0]
    cache.store("tune", KEY, {"power": 0.5})
    assert cache.load("tune", KEY) == {"power": 0.5} and len(warnings(caplog)) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")], ids=["full", "read-only"])
def test_a_disk_that_takes_nothing_costs_one_line(error, monkeypatch, caplog):
    cache.store("tune", KEY, {"power": 0.5})

    def fail(*_):
        raise error

    monkeypatch.setattr(os, "replace", fail)
    for _ in range(3):
        cache.store("tune", KEY, {"power": 0.75})
    assert cache.load("tune", KEY) == {"power": 0.5} and len(warnings(caplog)) == 1
    assert os.listdir(cache.path().parent) == ["settled.json"]


def test_a_folder_that_cannot_be_made_costs_one_line(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cache.store("tune", KEY, {"power": 0.5})
    assert cache.load("tune", KEY) is None and len(warnings(caplog)) == 1


@pytest.mark.parametrize("value", [{"x": float("nan")}, {"x": object()}], ids=["nan", "no JSON"])
def test_a_value_that_json_cannot_hold_is_not_kept(value, caplog):
    cache.store("tune", KEY, value)
    assert cache.load("tune", KEY) is None and len(warnings(caplog)) == 1 and not cache.path().exists()


def test_off_leaves_the_file_alone(configure):
    cache.store("tune", KEY, {"power": 0.5})
    before = cache.path().read_bytes()
    configure("[taylor_patch]\ncache = false\n")
    engines.engine()
    cache.store("tune", KEY, {"power": 0.75})
    assert cache.load("tune", KEY) is None and cache.path().read_bytes() == before


def test_threads_lose_nothing():
    threads = [threading.Thread(target=cache.store, args=("tune", {"number": n}, {"value": n})) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [cache.load("tune", {"number": n}) for n in range(20)] == [{"value": n} for n in range(20)]


class Model:
    def __init__(self, *sizes):
        self.diffusion_model = torch.nn.Sequential(*(torch.nn.Linear(size, size, device="meta") for size in sizes))


class Other(Model):
    pass


def test_a_fingerprint_tells_models_apart_without_reading_weights():
    """Parameters on the meta device have no weights."""
    assert fingerprint_of(Model(4, 8)) == fingerprint_of(Model(4, 8)) and fingerprint_of(Model(4, 8)).startswith("Model-")
    assert len({fingerprint_of(m) for m in (Model(4, 8), Model(8, 4), Model(4), Other(4, 8))}) == 4
    assert fingerprint_of(object()) is None


def test_the_place_of_a_call():
    q = torch.zeros(1, 2, 30, 8)
    call = AttentionCall(q, q[:, :1, :20], q[:, :1, :20], scale=1.0)
    assert cache.place(call) is None
    call = AttentionCall(q, q[:, :1, :20], q[:, :1, :20], scale=1.0, fingerprint="Flux-1")
    assert cache.place(call) == {"model": "Flux-1", "device": "cpu", "dtype": "float32", "q": "1x2x30x8", "k": "1x1x20x8"}


def test_the_command():
    cache.store("tune", KEY, {"power": 0.5})
    shown = CliRunner().invoke(main, ["cache"])
    assert shown.exit_code == 0 and "tune 1" in shown.output and str(cache.path()) in shown.output
    cleared = CliRunner().invoke(main, ["cache", "--clear", "--json"])
    assert json.loads(cleared.output)["entries"] == {"tune": 1} and not cache.path().exists()
    assert "no entries" in CliRunner().invoke(main, ["cache"]).output


def test_the_command_removes_crossovers_too():
    calibration.store(torch.device("cpu"), {"near_far": 4096})
    shown = CliRunner().invoke(main, ["cache"])
    assert "crossovers 1" in shown.output
    assert CliRunner().invoke(main, ["cache", "--clear"]).exit_code == 0
    assert not calibration.path().exists() and calibration.measured(torch.device("cpu")) == {}
