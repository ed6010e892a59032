"""Layers of configuration, their messages, and rules."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Literal

import pytest
import torch

import taylor_patch
from taylor_patch import config as configuration
from taylor_patch import engine as engines
from taylor_patch import plugins
from taylor_patch.call import AttentionCall
from taylor_patch.errors import ConfigError
from taylor_patch.options import option
from taylor_patch.rules import parse_conditions

TYPES = plugins.load(found=()).option_types


def load(environ=None, **kwargs):
    return configuration.load(TYPES, environ={} if environ is None else environ, **kwargs)


def test_defaults():
    found = load()
    assert found.settings == configuration.Settings() and found.rules == () and found.target_error == 0.03


def test_order_of_layers(tmp_path, monkeypatch):
    work, comfyui, user, named = (tmp_path / name for name in ("work", "comfyui", "user", "named"))
    for number, folder in enumerate((work, comfyui, user, named), 1):
        folder.mkdir()
        (folder / "taylor_patch.toml").write_text(f"[taylor_patch]\nmin_tokens = {number}\n")
    monkeypatch.chdir(work)
    monkeypatch.setattr("platformdirs.user_config_dir", lambda *a, **k: str(user))

    def tokens(environ=None, overrides=None):
        return load(environ, overrides=overrides, comfyui_user=comfyui).settings.min_tokens

    assert tokens() == 1
    assert tokens({"TAYLOR_PATCH_CONFIG": str(named / "taylor_patch.toml")}) == 4
    assert tokens({"TAYLOR_PATCH_MIN_TOKENS": "5"}) == 5
    assert tokens({"TAYLOR_PATCH_MIN_TOKENS": "5"}, {"taylor_patch": {"min_tokens": 6}}) == 6
    (work / "taylor_patch.toml").unlink()
    assert tokens() == 2
    (comfyui / "taylor_patch.toml").unlink()
    assert tokens() == 3
    (user / "taylor_patch.toml").unlink()
    assert tokens() == "auto"


def test_layers_join_by_key(configure):
    configure('[taylor_patch]\nbackend = "near_far"\nquality = "fast"\n')
    found = load({"TAYLOR_PATCH_QUALITY": "lossless"})
    assert found.settings.backend == "near_far" and found.target_error == 0.02


MISTAKES = {
    "unknown-key": ('[taylor_patch]\n  bakend = "auto"\n', ":2:3: taylor_patch.bakend: unknown key", 'mean "backend"'),
    "backend": ('[taylor_patch]\nbackend = "near_fra"\n', ":2:1: taylor_patch.backend:", 'mean "near_far"'),
    "table": ("[taylor_pach]\n", ":1:2: taylor_pach: unknown table", 'mean "taylor_patch"'),
    "quality": ('\n[taylor_patch]\nquality = "balancd"\n', ":3:1: taylor_patch.quality:", 'mean "balanced"'),
    "quality-range": ("[taylor_patch]\nquality = 2.0\n", ":2:1: taylor_patch.quality: 2.0 is outside", ""),
    "type": ('[taylor_patch]\nenabled = "yes"\n', ':2:1: taylor_patch.enabled: "yes" is not true or false.', ""),
    "quoted": ('[taylor_patch]\nmin_tokens = "8192"\n', ':2:1: taylor_patch.min_tokens: "8192" is not "auto" or a whole number:',
               ": leave out the quotes."),
    "quoted-bool": ('[taylor_patch]\nenabled = "false"\n', ":2:1: taylor_patch.enabled:", "leave out the quotes"),
    "float": ('[taylor_patch]\nquality_limit = "1.5"\n', ':2:1: taylor_patch.quality_limit: "1.5" is not a number: leave', ""),
    "text": ("[taylor_patch]\nlog_file = 3\n", ":2:1: taylor_patch.log_file: 3 is not text.", ""),
    "no-table": ("enabled = false\n", ":1:1: enabled: unknown table", "Put it under [taylor_patch]."),
    "windows-path": ('[taylor_patch]\nlog_file = "C:\\Users\\me\\x.jsonl"\n', ":2:", "write / in paths, or put them in single quotes"),
    "no-steps": ("[taylor_patch]\nstart_percent = 0.8\nend_percent = 0.5\n", ":2:1: taylor_patch.start_percent: 0.8", "below end_percent"),
    "rule-does-nothing": ('[[rules]]\nwhen = { kind = "self" }\n', ":2:1: rules[0].when: the rule does nothing", "backend"),
    "bool-is-no-int": ("[taylor_patch]\nmin_tokens = true\n", ":2:1: taylor_patch.min_tokens: true is not", "a whole number"),
    "literal": ('[taylor_patch]\nlog = "rum"\n', ":2:1: taylor_patch.log:", 'mean "run"'),
    "backends": ("[taylor_patch]\n[backends.nearfar]\n", ":2:2: backends.nearfar: unknown backend", 'mean "near_far"'),
    "option": ("[backends.near_far]\ndensty = 1\n", ":2:1: backends.near_far.densty: unknown key", 'mean "density"'),
    "option-range": ("[backends.near_far]\ndensity = 1.5\n", ":2:1: backends.near_far.density: 1.5", ""),
    "rule-key": ("[[rules]]\nquality = 1\n[[rules]]\nbackand = 1\n", ":4:1: rules[1].backand: unknown key", 'mean "backend"'),
    "rule-when": ('[[rules]]\nwhen = { tokns = ">=1" }\n', ':2:1: rules[0].when: unknown condition "tokns"', 'mean "tokens"'),
    "rule-backend": ('[[rules]]\nbackend = "sdpaa"\n', ":2:1: rules[0].backend:", 'mean "sdpa"'),
    "rule-quality": ("[[rules]]\nquality = 5\n", ":2:1: rules[0].quality: 5.0 is outside", ""),
    "toml": ("[taylor_patch]\nbackend = near\n", ":2:", "not valid TOML"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_messages_name_the_place_and_the_nearest_name(configure, mistake):
    text, place, hint = MISTAKES[mistake]
    path = configure(text)
    with pytest.raises(ConfigError) as error:
        load()
    assert str(error.value).startswith(str(path) + place) and hint in str(error.value), str(error.value)


def test_named_file_must_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"TAYLOR_PATCH_CONFIG: .*missing is not a file"):
        load({"TAYLOR_PATCH_CONFIG": str(tmp_path / "missing")})


@pytest.mark.parametrize(("variables", "check"), [
    ({"TAYLOR_PATCH": "near_far"}, lambda c: c.settings.backend == "near_far"),
    *(({"TAYLOR_PATCH": word}, lambda c: c.settings.backend == "auto") for word in ("", "1", "0 ", "on", " True", "YES", '"1"', "off", "No")),
    ({"TAYLOR_PATCH": " Near_Far "}, lambda c: c.settings.backend == "near_far"),
    ({"TAYLOR_PATCH_BACKEND": "Near_Far "}, lambda c: c.settings.backend == "near_far"),
    ({"TAYLOR_PATCH_ENABLED": "False "}, lambda c: c.settings.enabled is False),
    ({"TAYLOR_PATCH": "sdpa", "TAYLOR_PATCH_BACKEND": "near_far"}, lambda c: c.settings.backend == "near_far"),
    ({"TAYLOR_PATCH_ENABLED": "false"}, lambda c: c.settings.enabled is False),
    ({"TAYLOR_PATCH_QUALITY": "0.07"}, lambda c: c.target_error == 0.07),
    ({"TAYLOR_PATCH_BACKENDS__NEAR_FAR__DENSITY": "0.5"}, lambda c: c.options["near_far"].density == 0.5),
    ({"TAYLOR_PATCH_BACKENDS__TAYLOR_TORCH__P": "3"}, lambda c: c.options["taylor_torch"].P == 3),
    ({"TAYLOR_PATCH_BACKENDS__TAYLOR_TORCH__MAX_FEATURE_DIM_R": "9"},
     lambda c: c.options["taylor_torch"].max_feature_dim_R == 9),
    ({"TAYLOR_PATCH_PLUGINS": "a", "TAYLOR_PATCH_STRICT": "1"}, lambda c: c.plugins.allow == ("*",)),
], ids=lambda x: "+".join(x) if isinstance(x, dict) else "")
def test_environment(variables, check):
    assert check(load(variables))


NESTED = "Write TAYLOR_PATCH_BACKENDS__NEAR_FAR__DENSITY, with two underscores"


@pytest.mark.parametrize(("variables", "begins", "hint"), [
    ({"TAYLOR_PATCH": "tru"}, "TAYLOR_PATCH=tru: neither on (1), off (0) nor a backend: near_far", 'mean "true"?'),
    ({"TAYLOR_PATCH": "near_fra "}, "TAYLOR_PATCH=near_fra: ", 'mean "near_far"?'),
    ({"TAYLOR_PATCH_BACKEND": "near_fra"}, 'TAYLOR_PATCH_BACKEND: taylor_patch.backend: "near_fra" is not one of', 'mean "near_far"?'),
    ({"TAYLOR_PATCH_ENABLED": "0"}, "TAYLOR_PATCH_ENABLED: taylor_patch.enabled: 0 is not true or false", ""),
    ({"TAYLOR_PATCH_QUALITY": "3"}, "TAYLOR_PATCH_QUALITY: taylor_patch.quality: ", ""),
    ({"TAYLOR_PATCH_BACKENDS__NEAR_FAR__DENSITY": "2"}, "TAYLOR_PATCH_BACKENDS__NEAR_FAR__DENSITY: backends.near_far.density", ""),
    ({"TAYLOR_PATCH_BAKEND": "auto"}, "TAYLOR_PATCH_BAKEND: there is no such setting.", 'mean "TAYLOR_PATCH_BACKEND"?'),
    ({"TAYLOR_PATCH_BACKENDS_NEAR_FAR_DENSITY": "0.1"}, "TAYLOR_PATCH_BACKENDS_NEAR_FAR_DENSITY: there is no such setting.", NESTED),
    ({"TAYLOR_PATCH_DENSITY": "0.1"}, "TAYLOR_PATCH_DENSITY: there is no such setting.", NESTED),
    ({"TAYLOR_PATCH_BACKENDS__NEARFAR__DENSITY": "0.1"}, "TAYLOR_PATCH_BACKENDS__NEARFAR__DENSITY: backends.nearfar: unknown backend", ""),
    ({"TAYLOR_PATCH_BACKENDS__NEAR_FAR": "x"}, "TAYLOR_PATCH_BACKENDS__NEAR_FAR: there is no such setting.", "NEAR_FAR__"),
    ({"TAYLOR_PATCH_BACKENDS__NEAR_FAR": "x", "TAYLOR_PATCH_BACKENDS__NEAR_FAR__DENSITY": "0.5"},
     "TAYLOR_PATCH_BACKENDS__NEAR_FAR__DENSITY: another variable gives near_far a value", ""),
], ids=lambda x: "+".join(f"{n}={v}" for n, v in x.items()) if isinstance(x, dict) else "")
def test_wrong_variables_are_configuration_errors(variables, begins, hint):
    with pytest.raises(ConfigError) as error:
        load(variables)
    assert str(error.value).startswith(begins) and hint in str(error.value), str(error.value)


@pytest.mark.parametrize("word", ["", "0", "0 ", "off", " FALSE", "no", "1", "on", "True", "yes", "near_far", "tru"])
def test_start_up_and_configuration_agree_on_the_switch(word):
    """What start-up takes for off changes no setting, and what names a backend is on."""
    asked = taylor_patch.asked_for(word)
    try:
        backend = load({"TAYLOR_PATCH": word}).settings.backend
    except ConfigError:
        backend = "wrong"
    assert (asked, backend) == {"near_far": ("near_far", "near_far"), "tru": ("tru", "wrong")}.get(
        word, ("1" if word in ("1", "on", "True", "yes") else "", "auto"))


def test_a_mark_at_the_beginning(configure):
    configure("\ufeff[taylor_patch]\nbackend = \"near_far\"\n")
    assert load().settings.backend == "near_far"


def touch(path, text):
    path.write_text(text)
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))


def test_invalid_file_at_run_time_keeps_the_last_good(configure, caplog):
    path = configure('[taylor_patch]\nbackend = "near_far"\n')
    engine = engines.engine()
    touch(path, '[taylor_patch]\nbackend = "nope"\n')
    with engine.run([1.0, 0.0]):
        pass
    assert engine.config.settings.backend == "near_far" and "nope" in engine.problem
    assert [r.getMessage() for r in caplog.records if "last good" in r.getMessage()]
    touch(path, '[taylor_patch]\nbackend = "taylor_torch"\n')
    os.utime(path, ns=(2 * 10**18, 2 * 10**18))
    engine.reload()
    assert engine.config.settings.backend == "taylor_torch" and engine.problem is None


def test_invalid_file_at_start_is_exact(configure, tmp_path, caplog):
    configure("[taylor_patch]\nbackend = 3\n")
    path = tmp_path / "taylor_patch.toml"
    engine = engines.engine()
    assert engine.router.off == f"invalid configuration ({path}:2:1)" and engine.describe() == f"off by {engine.router.off}"
    (line,) = caplog.messages
    assert line.endswith(f"exact until the configuration is corrected: {path}:2:1: taylor_patch.backend: 3 is not text.")
    touch(path, "[taylor_patch]\nenabled = false\n")
    engine.reload()
    assert (engine.problem, engine.router.off, engine.describe()) == (None, "enabled = false", "off by enabled = false")
    touch(path, "")
    engine.reload()
    assert engine.router.off is None


def call(tokens=128, kv=None, dim=16, **fields):
    return AttentionCall(torch.zeros(1, 1, tokens, dim), torch.zeros(1, 1, kv or tokens, dim),
                         torch.zeros(1, 1, kv or tokens, dim), scale=1.0, **fields)


@pytest.mark.parametrize(("when", "fields", "expected"), [
    ({}, {}, True),
    ({"model": "flux*"}, {"model": "Flux2"}, True),
    ({"model": "flux*"}, {"model": "Wan"}, False),
    ({"model": "*"}, {}, False),
    ({"tokens": ">=128"}, {}, True),
    ({"tokens": ">128"}, {}, False),
    ({"tokens": 128}, {}, True),
    ({"tokens": "< 128"}, {}, False),
    ({"sigma": "<=0.5"}, {"sigma": 0.5}, True),
    ({"sigma": "<=0.5"}, {"sigma": 0.6}, False),
    ({"sigma": "<=0.5"}, {}, False),
    ({"layers": "4-8"}, {"block": 8}, True),
    ({"layers": "4-8"}, {"block": 9}, False),
    ({"layers": "4-"}, {"block": 4}, True),
    ({"layers": "-4"}, {"block": 5}, False),
    ({"layers": "4"}, {"block": 4}, True),
    ({"layers": "4"}, {"block": 5}, False),
    ({"layers": "0-"}, {}, False),
    ({"kind": "self"}, {}, True),
    ({"kind": "self"}, {"kv": 7}, False),
    ({"kind": "cross"}, {"kv": 7}, True),
    ({"kind": "cross"}, {}, False),
    ({"head_dim": "==16"}, {}, True),
    ({"head_dim": "==16", "kind": "cross"}, {}, False),
], ids=str)
def test_conditions(when, fields, expected):
    assert parse_conditions(when).match(call(**fields)) is expected


@pytest.mark.parametrize("when", [{"layers": "-"}, {"layers": "a"}, {"kind": "both"}, {"tokens": "~5"}, {"tokens": "1.2.3"}],
                         ids=str)
def test_bad_conditions(when):
    with pytest.raises(ValueError):
        parse_conditions(when)


RULES = """
[taylor_patch]
backend = "near_far"
quality = 0.08
[plugins]
allow = ["a*", "say \\"b\\""]
[backends.near_far]
density = 0.25
[[rules]]
when = { kind = "cross" }
backend = "sdpa"
[[rules]]
when = { tokens = ">=64", head_dim = 16 }
quality = "lossless"
[[rules]]
when = { kind = "self" }
backend = "taylor_torch"
"""


def test_first_rule_that_matches_wins(configure):
    configure(RULES)
    router = engines.engine().router
    assert router.choose(call(kv=7)).reasons == ('backend = "sdpa"',)
    assert router.choose(call()).backend.name == "taylor_torch"
    assert router.target_error(call()) == 0.02 and router.target_error(call(dim=32)) == 0.08


def test_as_toml_round_trip(configure):
    configure(RULES)
    first = load()
    configure(configuration.as_toml(first))
    second = load()
    assert (second.settings, second.plugins, second.options) == (first.settings, first.plugins, first.options)
    assert [(r.conditions, r.backend, r.quality) for r in second.rules] == \
        [(r.conditions, r.backend, r.quality) for r in first.rules]
    assert len(second.rules) == 3 and first.plugins.allow == ("a*", 'say "b"')


def test_explain(configure):
    path = configure("[taylor_patch]\nmin_tokens = 7\n")
    found = load({"TAYLOR_PATCH_MIN_TOKENS": "9"})
    rows = configuration.explain(found, "min_tokens")
    assert rows == [("TAYLOR_PATCH_MIN_TOKENS", 9, True), (f"{path}:2:1", 7, False), ("default", "auto", False)]
    assert configuration.explain(found, "taylor_patch.quality") == [("default", "balanced", True)]
    assert configuration.explain(found, "backends.near_far.tail") == [("default", "cumulant", True)]


def test_explain_names_where_an_option_is():
    with pytest.raises(ConfigError, match=r"density: unknown key\. There is backends\.near_far\.density\."):
        configuration.explain(load(), "density")


@pytest.mark.parametrize("key", ["min_token", "backends.near_far.nothing", "nowhere.at", "problems",
                                 "backends.near_far.exact_share"])
def test_explain_unknown_key(key):
    with pytest.raises(ConfigError, match=re.escape(key)):
        configuration.explain(load(), key)


def test_schema_covers_every_key():
    schema = configuration.schema(TYPES)
    properties = schema["properties"]
    assert set(properties) == {"taylor_patch", "plugins", "backends", "rules", "profiles"}
    log = properties["taylor_patch"]["properties"]["log"]
    assert log.pop("description") and log == {"enum": ["off", "run", "step", "call"], "default": "run"}
    assert properties["backends"]["properties"]["near_far"]["properties"]["density"]["exclusiveMinimum"] == 0
    assert properties["taylor_patch"]["properties"]["min_tokens"]["anyOf"] == [{"type": "integer"}, {"enum": ["auto"]}]
    assert set(properties["backends"]["properties"]) == set(TYPES)
    assert properties["backends"]["properties"]["near_far"]["additionalProperties"] is False
    assert properties["plugins"]["properties"]["allow"]["default"] == ["*"]


TABLES = {"taylor_patch": configuration.Settings, "plugins": configuration.PluginSettings, **TYPES}


@pytest.mark.parametrize("name", TABLES)
def test_every_option_has_a_meaning(name):
    """The schema and docs/reference/options.md print it. The same line twice in a class would be a copy that nobody corrected."""
    meanings = [field.metadata.get("description", "") for field in dataclasses.fields(TABLES[name])]
    assert all(len(meaning) > 10 and "\n" not in meaning and "|" not in meaning for meaning in meanings), meanings
    assert len(set(meanings)) == len(meanings)


@dataclasses.dataclass(frozen=True)
class Bounded:
    """As a plugin would declare it."""

    rows: int = option(5, "rows", at_least=2)
    share: float = option(0.5, "share", above=0, at_most=1)
    sigma: float | Literal["auto"] = option("auto", "sigma", at_least=0, at_most=3)
    size: Literal["auto", 16, 32] = option("auto", "size")
    top: float = option(0.0, "top", at_most=7)
    plain: int = 3

    def problems(self):
        return {"plain": "odd is wanted"} if self.plain % 2 == 0 else {}


@pytest.mark.parametrize(("text", "problem"), [
    ("rows = 1", "rows: 1 is below 2"), ("share = 0", "share: 0.0 is outside 0 to 1 (0 excluded)"), ("share = 1.5", "share: 1.5 is outside"),
    ("share = nan", "share: nan is outside"), ("sigma = -1", "sigma: -1.0 is outside 0 to 3"), ("top = 8", "top: 8.0 is above 7"),
    ("size = 17", 'size: 17 is not "auto" or 16 or 32'), ("size = true", 'size: true is not "auto" or 16'),
    ("plain = 2", "plain: odd is wanted"),
])
def test_bounds_of_options(configure, text, problem):
    path = configure(f"[backends.mine]\n{text}\n")
    with pytest.raises(ConfigError) as error:
        configuration.load({"mine": Bounded}, environ={})
    assert str(error.value).startswith(f"{path}:2:1: backends.mine.{problem}"), str(error.value)


def test_values_within_their_bounds(configure):
    configure('[backends.mine]\nrows = 2\nshare = 1\nsigma = 3\nsize = 32\ntop = -9.0\n')
    assert configuration.load({"mine": Bounded}, environ={}).options["mine"] == Bounded(2, 1.0, 3.0, 32, -9.0)


PROFILES = """[taylor_patch]
quality = "lossless"
profile = "video"
[[rules]]
backend = "sdpa"
[profiles.video]
quality = "fast"
[[profiles.video.rules]]
when = { tokens = ">=30000" }
backend = "near_far"
[profiles.picture]
backend = "near_far"
"""


def test_profile_wins_over_its_file_and_not_over_variables(configure):
    configure(PROFILES)
    found = load()
    assert found.target_error == 0.10 and [rule.backend for rule in found.rules] == ["near_far"]
    assert load({"TAYLOR_PATCH_QUALITY": "balanced"}).target_error == 0.03
    other = load({"TAYLOR_PATCH_PROFILE": "picture"})
    assert other.settings.backend == "near_far" and other.target_error == 0.02 and [rule.backend for rule in other.rules] == ["sdpa"]
    assert load({"TAYLOR_PATCH_PROFILE": ""}).target_error == 0.02


@pytest.mark.parametrize(("text", "place", "hint"), [
    ('[taylor_patch]\nprofile = "vidio"\n[profiles.video]\n', ":2:1: taylor_patch.profile", 'mean "video"'),
    ('[taylor_patch]\nprofile = "video"\n', ":2:1: taylor_patch.profile", "there are none"),
    ('[taylor_patch]\nprofile = "a"\n[profiles.a]\nqualty = 1\n', ":4:1: taylor_patch.qualty", 'mean "quality"'),
    ('[taylor_patch]\nprofile = "a"\n[profiles.a]\nbackend = "near_fra"\n', ":4:1: taylor_patch.backend", 'mean "near_far"'),
    ('[taylor_patch]\nprofile = "a"\n[[profiles.a.rules]]\nbackend = "x"\n', ":4:1: rules[0].backend", "is not one of"),
], ids=["unknown", "none", "key", "backend", "rule"])
def test_mistakes_in_profiles(configure, text, place, hint):
    path = configure(text)
    with pytest.raises(ConfigError) as error:
        load()
    assert str(error.value).startswith(str(path) + place) and hint in str(error.value), str(error.value)


@pytest.mark.parametrize(("text", "problem"), [
    ('[profiles.a]\nqualty = 1\n', "qualty"), ('[[profiles.a.rules]]\nbackend = "x"\n', "rules[0].backend"),
    ('[profiles.a]\nend_percent = 0.0\n', "end_percent"), ('[[profiles.a.rules]]\nwhen = {}\n', "does nothing"),
    ('[taylor_patch]\nprofile = "b"\n[[rules]]\nbackend = "x"\n[[profiles.b.rules]]\nquality = 0.1\n', "rules[0].backend"),
], ids=["key", "rule", "percent", "no-effect", "replaced-rules"])
def test_check_looks_at_what_is_not_in_force(configure, text, problem):
    configure(text)
    load()
    with pytest.raises(ConfigError, match=re.escape(problem)):
        configuration.check(configuration.layers_of(environ={}), TYPES)


def test_rules_on_kind_and_mask():
    import torch

    from taylor_patch.call import AttentionCall, TokenGrid
    from taylor_patch.rules import parse_conditions

    def kinds(call):
        words = [("kind", word) for word in ("self", "joint", "cross")] + [("mask", word) for word in ("none", "key", "row")]
        return {word for name, word in words if parse_conditions({name: word}).match(call)}

    x, y = torch.zeros(1, 1, 20, 8), torch.zeros(1, 1, 7, 8)
    assert kinds(AttentionCall(x, x, x, 1.0)) == {"self", "none"}
    assert kinds(AttentionCall(x, x, x, 1.0, key_mask=torch.zeros(1, 20), grid=TokenGrid(1, 4, 4, 4))) == {"self", "joint", "key"}
    assert kinds(AttentionCall(x, x, x, 1.0, grid=TokenGrid(1, 4, 5))) == {"self", "none"}
    assert kinds(AttentionCall(x, y, y, 1.0, row_mask=torch.zeros(1, 1, 20, 7))) == {"cross", "row"}
    with pytest.raises(ValueError, match="is not one of none, key, row"):
        parse_conditions({"mask": "rows"})


def test_respect_of_a_rule(configure):
    configure('[[rules]]\nwhen = { model = "wan*" }\nrespect = "rule"\n[[rules]]\nbackend = "sdpa"\n')
    assert [rule.respect for rule in load().rules] == ["rule", None]
    assert 'respect = "rule"' in configuration.as_toml(load())
    configure('[[rules]]\nrespect = "rules"\n')
    with pytest.raises(ConfigError, match=r':2:1: rules\[0\]\.respect: "rules" is not one of override, rule\. Did you mean "rule"'):
        load()


@pytest.mark.parametrize("value", ["true", "false", '"free_memory"'])
def test_memory_reserve(configure, value):
    configure(f"[taylor_patch]\nmemory_reserve = {value}\n")
    assert str(load().settings.memory_reserve).lower() == value.strip('"')
