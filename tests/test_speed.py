"""`miniconvit bench`: what it counts; how fast it is stands in benchmarks/, not here."""

import json

import pytest
from click.testing import CliRunner

from miniconvit.cli import program

SMALL = ["bench", "--model", "convit_micro32", "--img-size", "8", "--batch-size", "6"]


def run(*arguments):
    return CliRunner().invoke(program, [*SMALL, *arguments], standalone_mode=False)


def test_json_holds_the_promised_numbers():
    for mode in ([], ["--inference"]):
        found = json.loads(run("--steps", "3", "--threads", "1", "--json", *mode).stdout)
        assert len(found["step_ms"]) == 3
        assert found["step_ms_median"] == sorted(found["step_ms"])[1]
        assert found["images_per_second"] == pytest.approx(6 / found["step_ms_median"] * 1000)
        assert 20 < found["peak_memory_mb"] < 10_000
        assert found["threads"] == 1
        assert found["inference"] == bool(mode)


def test_table_says_what_was_measured():
    shown = run("--steps", "2").stdout
    assert "convit_micro32, 8x8 pixels, batch 6" in shown
    assert "images per second" in shown
    assert "training step" in shown


def test_a_size_that_does_not_fit_is_refused():
    result = run("--patch-size", "3")
    assert "cannot be cut into patches" in str(result.exception)
