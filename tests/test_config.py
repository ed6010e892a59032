"""Layers, positions of mistakes, and the last good configuration."""

import logging

import pytest

from taylor_patch import config, plugins
from taylor_patch.engine import Engine
from taylor_patch.errors import ConfigError

TYPES = plugins.load(found=()).option_types


def test_environment_wins_over_the_file(tmp_path):
    (tmp_path / "taylor_patch.toml").write_text('[taylor_patch]\nbackend = "sdpa"\nmin_tokens = 5\n')
    loaded = config.load(TYPES, environ={"TAYLOR_PATCH": "near_far", "TAYLOR_PATCH_BACKENDS__NEAR_FAR__DENSITY": "0.2"})
    assert (loaded.settings.backend, loaded.settings.min_tokens, loaded.options["near_far"].density) == ("near_far", 5, 0.2)
    rows = config.explain(loaded, "backend")
    assert [(value, wins) for _, value, wins in rows] == [("near_far", True), ("sdpa", False), ("auto", False)]


@pytest.mark.parametrize(("text", "message"), [
    ('[taylor_patch]\nbackend = "near_fat"\n', r'taylor_patch.toml:2:1: .*Did you mean "near_far"'),
    ("[taylor_patch]\nlog = 3\n", r"taylor_patch.toml:2:1: .*log: 3 is not"),
    ("[backends.near_far]\n\n  densty = 0.1\n", r'taylor_patch.toml:3:3: .*Did you mean "density"'),
    ("[taylor_patch]\nquality = 4\n", r"taylor_patch.toml:2:1: .*outside"),
    ('[[rules]]\nbackend = "sdpa"\n[[rules]]\nwhen = { tokns = ">3" }\n', r'taylor_patch.toml:4:1: .*Did you mean "tokens"'),
    ("[taylor_patch\n", r"taylor_patch.toml:1:\d+: not valid TOML"),
], ids=["backend", "type", "option", "range", "rule", "syntax"])
def test_mistakes_are_placed(tmp_path, text, message):
    (tmp_path / "taylor_patch.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.load(TYPES, environ={})


def test_round_trip(tmp_path):
    path = tmp_path / "other.toml"
    path.write_text(config.as_toml(config.merge([], TYPES)))
    assert config.merge([config.file_layer(path)], TYPES) == config.merge([], TYPES)


def test_invalid_file_keeps_the_last_good_one(tmp_path, caplog):
    path = tmp_path / "taylor_patch.toml"
    path.write_text('[taylor_patch]\nbackend = "sdpa"\n')
    engine = Engine(environ={})
    path.write_text('[taylor_patch]\nbackend = "nonsense"\n')
    with caplog.at_level(logging.WARNING):
        engine.reload()
    assert engine.config.settings.backend == "sdpa"
    assert "last good configuration" in caplog.text
    path.write_text('[taylor_patch]\nbackend = "near_far"\n')
    engine.reload()
    assert engine.config.settings.backend == "near_far" and engine.problem is None


def test_invalid_file_at_start_means_exact(tmp_path):
    (tmp_path / "taylor_patch.toml").write_text("[taylor_patch]\nbackend = 1\n")
    engine = Engine(environ={})
    assert engine.router.off and "taylor_patch.toml:2:1" in engine.problem
