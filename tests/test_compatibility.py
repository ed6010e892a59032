"""benchmarks/compatibility.py and the page that it writes."""

from __future__ import annotations

import pytest

compatibility = pytest.importorskip("benchmarks.compatibility", reason="benchmarks/ is not part of the source package")

JUNIT = """<testsuites><testsuite>
<testcase name="test_off_is_bit_identical[a-flux]"><properties><property name="comfyui" value="1.2.3"/>
<property name="case" value="flux"/><property name="versions" value='{{"torch": "9"}}'/></properties>{flux}</testcase>
<testcase name="test_counts[a-flux]"><properties><property name="comfyui" value="1.2.3"/><property name="case" value="flux"/>
<property name="calls" value='[2, 6, {{"small": 3}}]'/></properties></testcase>
<testcase name="test_counts[a-krea2]"><properties><property name="comfyui" value="1.2.3"/><property name="case" value="krea2"/></properties>
<skipped message="no"/></testcase>
<testcase name="test_sequence[a]"><properties><property name="comfyui" value="1.2.3"/><property name="case" value="sequence"/></properties>
</testcase><testcase name="test_else"/></testsuite></testsuites>"""


@pytest.mark.parametrize(("inner", "flux"), [("", "near_far 6, exact 3"), ("<failure/>", "failed: test_off_is_bit_identical"),
                                             ("<error/>", "failed: test_off_is_bit_identical")])
def test_outcomes(tmp_path, inner, flux):
    (tmp_path / "junit.xml").write_text(JUNIT.format(flux=inner))
    rows = compatibility.outcomes(tmp_path / "junit.xml")
    assert [compatibility.cell(row) for row in rows] == [flux, "no such model", "passed"]
    assert rows[0]["torch"] == "9"
    assert list(compatibility.families_table(rows))[2] == f"| flux | {flux} | small |"


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "junit.xml").write_text('<testsuites><testsuite><testcase name="x"/></testsuite></testsuites>')
    with pytest.raises(SystemExit, match="no results"):
        compatibility.outcomes(tmp_path / "junit.xml")


def test_keep_replaces_a_version(tmp_path, monkeypatch):
    monkeypatch.setattr(compatibility, "KEPT", tmp_path / "kept.jsonl")
    compatibility.keep([{"comfyui": "1", "case": "a"}, {"comfyui": "2", "case": "a"}])
    compatibility.keep([{"comfyui": "2", "case": "b"}])
    assert [(row["comfyui"], row["case"]) for row in compatibility.load(tmp_path / "kept.jsonl")] == [("1", "a"), ("2", "b")]


def test_gpu_table():
    common = {"comfyui": "1", "setting": "static", "model": "wan", "gpu": "G", "torch": "2"}
    rows = [{**common, "variant": "off", "commit": "a", "step_seconds": 1.25, "finite": True, "device_used_mib": 2048},
            {**common, "variant": "on", "commit": "a", "error": "out of\nmemory | x"},
            {**common, "variant": "off", "commit": "b", "step_seconds": 1.0, "finite": True, "device_used_mib": 2048}]
    table = list(compatibility.gpu_table(rows))
    assert table[-1] == "| 1 | static | wan | 1.250 s, 2.0 GiB | failed: out of memory / x | a |", "b ran only a part"
    again = [*rows, {**common, "variant": "on", "commit": "b", "step_seconds": 0.5, "finite": True, "device_used_mib": 1024}]
    assert list(compatibility.gpu_table(again))[-1] == "| 1 | static | wan | 1.000 s, 2.0 GiB | 0.500 s, 1.0 GiB | b |"


def test_the_page_is_current():
    assert compatibility.PAGE.read_text(encoding="utf-8") == compatibility.page(), "run python -m benchmarks.compatibility"
