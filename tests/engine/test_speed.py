"""`miniconvit bench`: what it counts; how fast it is stands in benchmarks/, not here."""

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from miniconvit.cli import program

SMALL = ["bench", "--model", "convit_micro32", "--img-size", "8", "--batch-size", "6"]


def run(*arguments):
    return CliRunner().invoke(program, [*SMALL, *arguments], standalone_mode=False)


def test_json_holds_the_promised_numbers():
    for mode in ([], ["--inference"]):
        found = json.loads(run("--steps", "3", "--workers", "1", "--json", *mode).stdout)
        assert len(found["step_ms"]) == 3
        assert found["step_ms_median"] == sorted(found["step_ms"])[1]
        assert found["images_per_second"] == pytest.approx(6 / found["step_ms_median"] * 1000)
        assert 20 < found["peak_memory_mb"] < 10_000
        assert found["workers"] == 1
        assert found["inference"] == bool(mode)


def test_table_says_what_was_measured():
    shown = run("--steps", "2").stdout
    assert "convit_micro32, 8x8 pixels, batch 6" in shown
    assert "images per second" in shown
    assert "training step" in shown


def test_a_size_that_does_not_fit_is_refused():
    result = run("--patch-size", "3")
    assert "cannot be cut into patches" in str(result.exception)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere getrusage is all there is")
def test_peak_memory_is_not_that_of_the_process_that_asked():
    large = np.ones(400 * 2**17)  # 400 MB
    code = "from miniconvit.engine.speed import peak_memory_mb; print(peak_memory_mb())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 20 < float(found.stdout) < 300 and large[-1] == 1.0
