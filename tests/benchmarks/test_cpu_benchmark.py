"""benchmarks/cpu.py: its arithmetic, and that it survives a side that fails. cpu_profile.py: its
rows. How fast we are stands in docs/results/cpu, not here."""

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from with_numba import needs_numba

ROOT = Path(__file__).parents[2]
ROW = "Ti 32x32 / 4, batch 16, train"


def load(name):
    spec = importlib.util.spec_from_file_location(
        f"{name}_benchmark", ROOT / f"benchmarks/{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = load("cpu")
    monkeypatch.setattr(module, "TURN", 0.0)
    monkeypatch.setattr(module, "PAUSE", 0.0)
    return module


def side(*seconds, **facts):
    return {"seconds": list(seconds), "peak_memory_mb": 100.0, **facts}


def test_a_ratio_is_the_median_of_the_rounds_ratios(script):
    """Of a machine that is twice as slow in the second round: the ratios do not see it."""
    first = {
        "ours": side(0.25, 0.5, 0.25, 0.5, 0.25),
        "convit": side(0.5, 0.75, 0.5, 1.0, 0.25, peak_memory_mb=800.0),  # 2, 1.5, 2, 2 and 1 times
        "twin": side(0.2, 0.4, 0.2, 0.4, 0.2),
        "matmul": {"seconds": [0.25, 0.5, 0.25, 0.5, 0.25]},
    }
    second = {"ours": side(1.0, 1.0), "deit": side(0.5, 0.7)}
    results = [{"row": ROW, "found": found} for found in (first, second)]
    text, (row,) = script.table(results)
    assert row["row"] == ROW and row["turns"] == 5
    assert row["images_per_second"]["ours"] == 64.0  # not of the second group
    assert row["ratio"]["convit"] == [2.0, 1.5, 2.0]
    assert row["ratio"]["deit"] == pytest.approx([0.6, 0.55, 0.65])
    assert row["convit_over_twin_time"] == pytest.approx(1.25)
    gflop = 16 * script.step_gflop("tiny32", "train")
    assert row["share_of_matmul_peak"] == pytest.approx(gflop / script.MATMUL_GFLOP)
    cells = ["64.0", "32.0", "2.00 (1.50 to 2.00)", "26.7", "0.60 (0.55 to 0.65)", "80.0", "1.25"]
    assert f"| {ROW} | {' | '.join(cells)} | 100 | 800 | " in text


def test_the_plan_asks_for_every_row_of_the_issue(script):
    names = [name for name, *_ in script.plan()]
    assert len(names) == 12
    for shape in ("Ti 32x32 / 4", "Ti 224x224 / 16", "S 224x224 / 16"):
        for batch in (16, 128):
            for mode in ("train", "infer"):
                assert f"{shape}, batch {batch}, {mode}" in names
    compiled = [name for name, *_, groups in script.plan() if "compiled" in sum(groups, ())]
    assert compiled == ["Ti 32x32 / 4, batch 128, train"]


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_a_side_that_fails_is_named_and_the_others_go_on(script, mode):
    """timm is missing here, or has no such size."""
    found = script.measure(("ours", "deit", "twin"), ("micro32", 4, mode, 2), 0.0)
    assert found["deit"]["error"].startswith("exit 1: ")
    for who in ("ours", "twin"):
        assert len(found[who]["seconds"]) == 3
        assert all(0 < seconds < 10 for seconds in found[who]["seconds"])
        assert 20 < found[who]["peak_memory_mb"] < 10_000
    text, (row,) = script.table([{"row": ROW, "found": found}])
    assert row["ratio"]["deit"] == [None] * 3
    assert f"{ROW}, deit: exit 1: " in text


def test_what_was_measured_is_not_measured_again(script, tmp_path, monkeypatch):
    asked = []

    def measure(sides, arguments, seconds):
        asked.append((sides, arguments[:3], seconds))
        return {who: side(0.5, 0.5, 0.5) for who in sides}

    monkeypatch.setattr(script, "measure", measure)
    arguments = [str(tmp_path), "--only", ROW, "--without", "matmul"]
    for _ in range(2):
        result = CliRunner().invoke(script.main, arguments, catch_exceptions=False)
        assert result.exit_code == 0
    row = ("tiny32", 16, "train")
    assert asked == [(("ours", "convit", "twin"), row, 120.0), (("ours", "deit"), row, 120.0)]
    assert json.loads((tmp_path / "table.json").read_text())["rows"][0]["row"] == ROW
    assert f"| {ROW} | 32.0 |" in (tmp_path / "table.md").read_text()


@needs_numba
def test_the_profile_has_a_row_for_every_part(monkeypatch):
    script = load("cpu_profile")
    monkeypatch.setattr(script, "ROUNDS", 2)
    result = CliRunner().invoke(
        script.main, ["--model", "convit_mini32", "--images", "2"], catch_exceptions=False
    )
    assert result.exit_code == 0
    rows = [line.strip("| ").split(" | ") for line in result.output.splitlines() if line[:1] == "|"]
    assert [name for name, *_ in rows[2:]] == [
        "fc1 alone",
        "GELU alone, in MLP forward",
        *(f"{name} {way}" for name in ("layernorm", "mlp", "gpsa", "mhsa")
          for way in ("forward", "backward")),
        "all blocks",
    ]  # fmt: skip
    assert all(float(cell) > 0 for _, _, cell, *_ in rows[2:-1])
