"""benchmarks/cpu.py: its arithmetic, that it survives a side that fails, and that it waits for a
quiet machine. cpu_profile.py: its rows. How fast we are stands in docs/results/cpu, not here."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from with_numba import needs_numba

from miniconvit.errors import UserError

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
    monkeypatch.setattr(module, "REPEATS", 0)  # whatever else this machine does
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
    cells = ["64.0", "32.0", "2.00 (1.50 to 2.00)"]  # and no column of autocast
    cells += ["26.7", "0.60 (0.55 to 0.65)", "80.0", "1.25", "100", "800"]
    assert f"| {ROW} | {' | '.join(cells)} | " in text
    assert text.startswith("| row | ours, images/s | timm ConViT | ratio | timm DeiT | ratio | ")


def test_bf16_is_a_row_of_its_own(script):
    """Both of ours have a ratio to autocast, each of the rounds that they shared with it."""
    first = {"ours": side(1.0, 1.0), "convit": side(2.0, 2.0, peak_memory_mb=800.0)}
    bf16 = {
        "ours": side(0.5, 1.0),
        "ours-bf16": side(0.25, 0.25, peak_memory_mb=70.0),
        "autocast": side(0.5, 0.75, peak_memory_mb=600.0),
        "onednn": side(1.0, 1.0),
    }
    text, (row, fast) = script.table([{"row": ROW, "found": found} for found in (first, bf16)])
    assert (row["row"], fast["row"]) == (ROW, f"{ROW}, bf16")
    assert row["ratio"]["autocast"] == pytest.approx([0.875, 0.8125, 0.9375])
    assert row["ratio"]["convit"] == [2.0] * 3 and fast["ratio"]["convit"] == [None] * 3
    assert fast["ratio"]["autocast"] == [2.5, 2.25, 2.75]
    assert fast["ratio"]["onednn"] == [4.0] * 3
    assert fast["ratio"]["ours"] == [3.0, 2.5, 3.5]
    assert "ours" not in row["ratio"] and "ours-bf16" not in fast["ratio"]
    cells = ["64.0", "-", "-", "25.6", "2.50 (2.25 to 2.75)", "16.0", "4.00 (4.00 to 4.00)"]
    cells += ["70", "-", "600"]  # and no column of what neither row has
    assert f"| {ROW}, bf16 | {' | '.join(cells)} |\n" in text
    head, _, *lines = text.split("\n\n")[0].splitlines()
    assert {line.count("|") for line in lines} == {head.count("|")} and len(lines) == 2


def test_the_plan_asks_for_every_row_of_the_issue(script):
    names = [name for name, *_ in script.plan()]
    assert len(names) == 12
    for shape in ("Ti 32x32 / 4", "Ti 224x224 / 16", "S 224x224 / 16"):
        for batch in (16, 128):
            for mode in ("train", "infer"):
                assert f"{shape}, batch {batch}, {mode}" in names
    compiled = [name for name, *_, groups in script.plan() if "compiled" in sum(groups, ())]
    assert compiled == ["Ti 32x32 / 4, batch 128, train"]
    for name, *_, groups in script.plan():
        large = "224x224" in name and "batch 128" in name  # for the sake of autocast's memory
        assert groups[2] == ("ours", "ours-bf16", "autocast", "onednn")[: 3 if large else 4]


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_a_side_that_fails_is_named_and_the_others_go_on(script, mode):
    """timm is missing here, or has no such size."""
    found = script.measure(("ours", "deit", "twin"), ("micro32", 4, mode, 2), 0.0)["found"]
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
        return {"found": {who: side(0.5, 0.5, 0.5) for who in sides}, "disturbed": 0}

    monkeypatch.setattr(script, "measure", measure)
    monkeypatch.setattr(script, "check_precision", lambda precision, xp: None)
    monkeypatch.setattr(script, "numba_version", lambda: None)
    arguments = [str(tmp_path), "--only", ROW, "--without", "matmul"]
    for _ in range(2):
        result = CliRunner().invoke(script.main, arguments, catch_exceptions=False)
        assert result.exit_code == 0
    row = ("tiny32", 16, "train")
    groups = ("ours", "convit", "twin"), ("ours", "deit")
    groups += (("ours", "ours-bf16", "autocast", "onednn"),)
    assert asked == [(group, row, 120.0) for group in groups]
    assert json.loads((tmp_path / "table.json").read_text())["rows"][0]["row"] == ROW
    text = (tmp_path / "table.md").read_text()
    assert f"| {ROW} | 32.0 |" in text
    assert "\n- numba: none, so no kernels\n" in text


def test_without_bf16_all_else_is_measured(script, tmp_path, monkeypatch):
    def refuse(precision, xp):
        raise UserError(f"{precision} needs a CPU with AMX")

    def measure(sides, arguments, seconds):
        return {"found": {who: side(0.5, 0.5, 0.5) for who in sides}, "disturbed": 0}

    monkeypatch.setattr(script, "check_precision", refuse)
    monkeypatch.setattr(script, "measure", measure)
    result = CliRunner().invoke(script.main, [str(tmp_path), "--only", ROW], catch_exceptions=False)
    sentence = "Ours in bf16 is left out: bf16 needs a CPU with AMX.\n"
    assert result.output.startswith(sentence)
    assert sentence in (tmp_path / "table.md").read_text()
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert row["ratio"]["autocast"] == row["ratio"]["onednn"] == [1.0] * 3


def proc(folder, cores, processes):
    """A /proc of cores and of processes: {number: (parent, own ticks, ticks of its children)}."""
    lines = [f"cpu{i} {' '.join(map(str, core))} 0 0" for i, core in enumerate(cores)]
    (folder / "stat").write_text("\n".join(["cpu  9 9 9 9 9 9 9 9 0 0", *lines, "intr 7 7"]))
    for number, (parent, own, children) in processes.items():
        (folder / str(number)).mkdir(exist_ok=True)
        times = f"{own} 1 {children} 0"
        words = f"{number} (a) name) S {parent} 0 0 0 0 0 0 0 0 0 {times} 20 0"
        (folder / str(number) / "stat").write_text(words)


def test_what_other_programs_took_is_all_that_is_not_ours(script, tmp_path, monkeypatch):
    """Two of three cores are ours to use. Of their 200 ticks 150 are busy, stolen ones too, and
    ours are 120: of a worker, of the side above it, and of what was at work for this process and
    is over."""
    monkeypatch.setattr(script, "PROC", tmp_path)
    monkeypatch.setattr(script, "available_cores", lambda: {0, 1})
    me, a_side, worker, other = os.getpid(), 7_000_001, 7_000_002, 7_000_003
    # user, nice, system, idle, iowait, irq, softirq, steal
    cores = [[100, 0, 10, 50, 5, 0, 0, 0], [80, 0, 0, 90, 0, 0, 0, 3], [0] * 8]
    tree = {1: (0, 5, 0), me: (1, 10, 0), a_side: (me, 20, 0), worker: (a_side, 30, 4)}
    proc(tmp_path, cores, tree | {other: (1, 50, 0)})
    before = script.usage()
    assert before == (338, 193, 10 + 20 + 34 + 3)
    cores = [[180, 0, 20, 55, 10, 0, 0, 0], [120, 0, 0, 130, 0, 0, 0, 23], [100] * 8]
    tree |= {me: (1, 15, 25), a_side: (me, 50, 0), worker: (a_side, 90, 4)}
    proc(tmp_path, cores, tree | {other: (1, 80, 0)})
    after = script.usage()
    assert [end - start for start, end in zip(before, after, strict=True)] == [200, 150, 120]
    assert script.others_share(before, after) == pytest.approx(0.15)
    assert script.others_share((0, 0, 0), (100, 50, 51)) == 0.0  # ticks are counted coarsely
    assert script.others_share(before, before) == 0.0  # shorter than a tick
    monkeypatch.setattr(script, "PROC", tmp_path / "none")
    assert script.usage() is None and script.others_share(None, None) == 0.0


@pytest.mark.parametrize(
    "repeats, kept, disturbed",
    [(10, [1, 3, 6], 0), (2, [1, 3, 5], 1), (0, [1, 2, 3], 1)],
)
def test_a_round_beside_another_program_is_measured_again(
    script, monkeypatch, repeats, kept, disturbed
):
    """Of the rounds 1 to 6 the second, the fourth and the fifth are not quiet."""
    monkeypatch.setattr(script, "REPEATS", repeats)
    busy = iter([0.05, 0.06, 0.0, 0.5, 1.0, 0.04])
    monkeypatch.setattr(script, "usage", lambda: None)
    monkeypatch.setattr(script, "others_share", lambda before, after: next(busy))

    class Side:
        def __init__(self, who, *arguments):
            self.turns = 0

        def step(self):
            return 0.0

        def turn(self):
            self.turns += 1
            return float(self.turns)

        def facts(self):
            return {"peak_memory_mb": 1.0}

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr(script, "Side", Side)
    result = script.measure(("ours", "autocast"), (), 0.0)
    assert result["disturbed"] == disturbed
    for who in ("ours", "autocast"):
        assert result["found"][who] == {"seconds": kept, "peak_memory_mb": 1.0}
    text, _ = script.table([{"row": ROW} | result])
    sentence = f"{ROW}: other programs took more than 5 % of the cores' time in 1 of the rounds of "
    assert (f"{sentence}ours, autocast, after {repeats} repeats." in text) == bool(disturbed)


@pytest.mark.parametrize("seconds, steps", [(0.5, [2, 2]), (9.0, [1, 2])])
def test_what_is_compiled_has_two_steps_before_its_turns(script, monkeypatch, seconds, steps):
    """torch.compile compiles in the second one too, where gradients are there."""
    taken = {}

    def step(self):
        taken[self.who] += 1
        return seconds

    class Side(script.Side):
        def __init__(self, who, *arguments):
            self.who, taken[who] = who, 0

        def turn(self):
            return 1.0

        def facts(self):
            return {}

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr(script, "TURN", 1.0)
    monkeypatch.setattr(Side, "step", step)
    monkeypatch.setattr(script, "Side", Side)
    script.measure(("ours", "compiled"), (), 0.0)
    assert list(taken.values()) == steps


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
