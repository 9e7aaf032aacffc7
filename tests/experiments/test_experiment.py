"""The paper's experiments: what they plan, that they go on after a kill, and what they say."""

import csv
import json
import re
import signal
import statistics
from dataclasses import replace
from math import ceil, hypot
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from small_run import small_dataset

import miniconvit.cli.experiment as experiment_command
import miniconvit.experiments.plan as planning
import miniconvit.experiments.run as running
from miniconvit import VARIANTS, UserError, cli
from miniconvit.analysis.masks import without_branch, without_pos_embed
from miniconvit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from miniconvit.data import ImageArray, Split, normalize
from miniconvit.experiments.figures import draw
from miniconvit.experiments.plan import (
    EXPERIMENTS,
    complete,
    load_plan,
    make_plan,
    masked_layers,
    rows_of,
    speed_key,
)
from miniconvit.experiments.tables import _ahead, _halved, _pairs, compare, entries_of, write_tables
from miniconvit.model import convit_forward
from miniconvit.neighbours.cmt import CMT_VARIANTS, CMTConfig
from miniconvit.training.settings import RECIPES

SMALL = replace(VARIANTS["convit_micro32"], img_size=8, embed_dim=16, depth=3, local_up_to_layer=2)


def without_test(*_args, subset=1.0, **_kwargs):
    """The small data set without its test split, whose training images are cut class by class."""
    data = small_dataset()
    labels = data.train.labels
    nth = np.array([(labels[:i] == label).sum() for i, label in enumerate(labels)])
    total = np.array([(labels == label).sum() for label in labels])
    kept = nth < np.round(subset * total)
    data.train = Split(data.train.images.select(kept), labels[kept])
    data.test = None
    return data


def fake_speed(settings, *_args, **_where):
    """A step of 64 images takes a ConViT 16 s and a ViT 8 s, on no clock at all."""
    per_second = 4.0 if settings.local_up_to_layer else 8.0
    return {"images_per_second": per_second, "validation_seconds": 1.0, "start_seconds": 5.0}


@pytest.fixture
def small(monkeypatch, tmp_path):
    def load(_name, _dir, _download, subset, *_):
        return without_test(subset=subset)

    monkeypatch.setattr("miniconvit.training.run.load_dataset", load)
    monkeypatch.setattr(running, "load_dataset", without_test)
    monkeypatch.setattr(running, "measure", fake_speed)
    monkeypatch.setattr("miniconvit.experiments.plan.LEAST_STEPS", 4)
    monkeypatch.setattr("miniconvit.experiments.plan.VALIDATIONS", 2)
    monkeypatch.setattr("miniconvit.experiments.plan.READINGS", 3)
    monkeypatch.setitem(VARIANTS, "convit_micro32", SMALL)
    monkeypatch.setitem(VARIANTS, "vit_micro32", replace(SMALL, local_up_to_layer=0))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def program(capsys):
    """Calls `experiment` on the CPU: (exit status, standard output, standard error)."""

    def call(*argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main(["experiment", *map(str, argv), "--device", "cpu", "--workers", "1"])
        return end.value.code, *capsys.readouterr()

    return call


# The plan.


SIZED = {"hybrid": "convit_micro32", "mobile": "mobile_micro32"}  # there are no larger ones


def planned(name, model=None, **given):
    asked = complete(name, {"model": model or SIZED.get(name, "convit_mini32")} | given)
    rows = rows_of(asked)
    images = {row.settings.subset: int(45000 * row.settings.subset) for row in rows}
    speeds = {
        speed_key(row.settings): {
            "images_per_second": 300.0 + 40 * (row.settings.local_up_to_layer or 0),
            "validation_seconds": 2.0 + (row.settings.local_up_to_layer or 0),
            "start_seconds": 1.5,
        }
        for row in rows
    }
    return make_plan(asked, rows, images, speeds, "nowhere")


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("budget, seeds", [(50.0, 1), (333.0, 3), (10000.0, 2)])
def test_a_plan_fits_its_budget_and_uses_it(name, budget, seeds):
    plan = planned(name, budget=budget, seeds=seeds)
    recipe, size = ("cifar10-10min", 64) if name in SIZED else ("cifar10-hour", 32)
    most = {"escape": 20, "diversity": 2, "hybrid": 2, "mobile": 2}.get(name, 10)
    seconds, steps, warmups = 0.0, set(), []
    for row in plan.rows:
        s, speed = row.settings, row.speed
        assert row.images == int(45000 * s.subset)
        assert (s.recipe, s.batch_size, s.epochs) == (recipe, size, None)
        epoch = s.passes * (row.images // size)
        assert 1 <= ceil(s.steps / epoch) <= most
        seconds += 1.5 * (2 if row.masks else 1) + size * s.steps / speed["images_per_second"]
        seconds += (most + len(row.masks)) * speed["validation_seconds"]
        steps.add(s.steps)
        warmups.append(s.warmup_epochs * epoch)
    assert len(steps) == 1
    assert plan.images_seen == size * steps.pop()
    np.testing.assert_allclose(warmups, 0.1 * plan.steps)
    assert plan.minutes == pytest.approx(seeds * seconds / 60)
    assert 0.85 * budget < plan.minutes <= 0.9 * budget
    rows = [row.name for row in plan.rows]
    assert [(row.name, seed) for row, seed in plan.runs] == [
        (name, seed) for seed in range(seeds) for name in rows
    ]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_budget_too_small_names_one_that_is_large_enough(name):
    with pytest.raises(UserError, match=r"runs do not fit into --budget 0\.5:") as error:
        planned(name, budget=0.5)
    enough = float(re.search(r"they take about (\d+) minutes", str(error.value))[1])
    assert planned(name, budget=enough).steps >= 200
    with pytest.raises(UserError):
        planned(name, budget=0.9 * enough - 1)


def test_steps_stand_in_place_of_the_budget():
    plan = planned("sample-efficiency", steps=123, seeds=2)
    assert {row.settings.steps for row in plan.rows} == {123}
    assert plan.images_seen == 123 * 32 and "budget" not in plan.asked
    with pytest.raises(UserError, match="give one of them"):
        complete("escape", {"steps": 100, "budget": 60.0})


@pytest.mark.parametrize(
    "data, model, recipe",
    [
        ("cifar10", "convit_mini32", "cifar10-hour"),
        ("cifar10", "convit_micro32", "cifar10-10min"),
        ("cifar10", "convit_tiny32", "paper32"),
        ("cifar100", "convit_mini32", "cifar10-10min"),
    ],
)
def test_the_recipe_is_the_models_on_this_data(data, model, recipe):
    for row in rows_of(complete("masking", {"data": data, "model": model})):
        s = row.settings
        assert (s.recipe, s.lr, s.optimizer) == (recipe, RECIPES[recipe]["lr"], "adamw")
        assert s.model in (model, model.replace("convit", "vit"))


def changes(row, base):
    """What a row's settings have that those of another have not, but for the lengths."""
    mine, others = vars(row.settings), vars(base.settings)
    return {
        name: value
        for name, value in mine.items()
        if value != others[name] and name not in ("passes", "warmup_epochs")
    }


def test_table_3_has_its_rows():
    rows = {row.name: row for row in planned("ablation", budget=500.0).rows}
    frozen, random = {"freeze": "attention"}, {"local_init": False}
    twin = {"model": "vit_mini32", "local_up_to_layer": 0}
    expected = {"a": {}, "b": {"freeze": "gates"}, "c": random, "d": {"freeze": "gates"} | random}
    expected |= {"e": twin, "f": frozen, "g": frozen | random}
    assert {name: changes(row, rows["a"]) for name, row in rows.items()} == expected
    assert {row.settings.subset for row in rows.values()} == {0.1}


def back(twin):
    """From a ViT to its ConViT, the other way round than `twin`."""
    assert twin == {"model": "vit_mini32", "local_up_to_layer": 0}
    return {"model": "convit_mini32", "local_up_to_layer": 4}


def test_the_other_experiments_have_their_rows():
    twin = {"model": "vit_mini32", "local_up_to_layer": 0}
    rows = planned("sample-efficiency", budget=500.0, fractions=[1.0, 0.05, 0.3]).rows
    assert [row.settings.subset for row in rows] == [1.0, 1.0, 0.05, 0.05, 0.3, 0.3]
    assert [changes(b, a) for a, b in zip(rows[::2], rows[1::2], strict=True)] == [twin] * 3
    rows = planned("locality", budget=500.0).rows
    found = [(row.settings.local_up_to_layer, row.settings.locality_strength) for row in rows]
    assert found == [(0, 1.0)] + [(n, a) for n in (1, 3, 4) for a in (0.01, 0.1, 1.0)]
    convit, vit = planned("masking", budget=500.0).rows
    assert changes(vit, convit) == twin
    assert vit.masks == [["pos_embed"]]
    depths = [[branch, n] for branch in ("content", "position") for n in (1, 2, 4)]
    assert convit.masks == [["pos_embed"], *depths]
    assert masked_layers(VARIANTS["convit_micro32"]) == {3: 1, 5: 2, 10: 3}
    convit, vit = planned("escape", budget=500.0).rows
    assert (changes(vit, convit), convit.settings.subset) == (twin, 1.0)
    rows = {row.name: row for row in planned("diversity", budget=500.0).rows}
    cosine, more = {"cosine": 1.0}, {"contrastive": 1.0, "patch_mixing": 1.0}
    expected = {"vit": {}, "vit-cosine": cosine, "vit-all": cosine | more, "convit": back(twin)}
    expected["convit-cosine"] = back(twin) | cosine
    assert {name: changes(row, rows["vit"]) for name, row in rows.items()} == expected
    rows = planned("hybrid", budget=500.0, fractions=[0.1, 1.0]).rows
    assert [row.settings.subset for row in rows] == [0.1] * 5 + [1.0] * 5
    names = ["vit_micro32", "convit_micro32"]
    names += [f"cmt_micro32{end}" for end in ("", "_nolocal", "_nofilter")]
    assert [row.settings.model for row in rows] == 2 * names
    assert [row.settings.lr for row in rows] == 2 * [1.5e-3, 1.5e-3, 3e-3, 3e-3, 3e-3]
    words = planned("hybrid", "convit_micro32").recipe
    assert "optimizer adamw, peak learning rate 0.0015 or 0.003," in words
    with pytest.raises(UserError, match="no CMT of the size of convit_tiny32"):
        complete("hybrid", {"model": "convit_tiny32"})
    deep = complete("diversity", {})
    assert deep["model"] == "convit_deep32" and VARIANTS["convit_deep32"].depth == 12


def test_a_subset_smaller_than_a_batch_is_refused():
    asked = complete("sample-efficiency", {"fractions": [0.1, 1.0], "budget": 4000.0})
    rows = rows_of(asked)
    speeds = {speed_key(row.settings): fake_speed(row.settings) for row in rows}
    assert make_plan(asked, rows, {0.1: 64, 1.0: 640}, speeds, "nowhere").steps > 0
    with pytest.raises(UserError, match="10 % of cifar10 are 63 images, fewer than a batch of 64"):
        make_plan(asked, rows, {0.1: 63, 1.0: 630}, speeds, "nowhere")


def test_fractions_that_print_alike_are_refused():
    with pytest.raises(UserError, match="must differ"):
        complete("sample-efficiency", {"fractions": [0.1, 0.1 + 1e-12]})


# What is said of a difference.


def entry(label, mean, spread=None, paper=None, diverged=0, unit="%", values=()):
    return {"row": label, "label": label, "quantity": "top1", "unit": unit, "mean": mean,
            "spread": spread, "paper": paper, "diverged": diverged, "values": values}  # fmt: skip


@pytest.mark.parametrize(
    "first, second, words",
    [
        ((50.0, 0.3, 59.6), (49.5, 0.4, 48.0), r"\+0.5 points, within the spread of 0.5 "
         r"\(paper \+11.6\)$"),
        ((50.0, 0.3, None), (49.4, 0.4, 48.0), "beyond the spread of 0.5$"),
        ((49.4, 0.4), (50.0, 0.3), "^A against B: -0.6 points, beyond the spread"),
        ((50.0, None), (40.0, 0.4), "a single run has no spread"),
        ((50.0, 0.3), (40.0, 0.4, None, 1), r"\+10.0 points, without a verdict, as some"),
        ((49.98, 0.1), (50.0, 0.1), r": \+0.0 points, within"),
        ((None, None, None, 3), (40.0, 0.4), "no comparison, as every run of A diverged$"),
        ((40.0, 0.4), (None,), "no comparison, as every run of B is still to come$"),
    ],
)  # fmt: skip
def test_a_difference_within_the_spread_is_called_that(first, second, words):
    assert re.search(words, compare(entry("A", *first), entry("B", *second)))


def test_before_and_after_are_compared_run_by_run():
    before, after = [50.0, 60.0, 70.0], [49.0, 58.0, 69.5]  # differences 1, 2, 0.5
    first, second = (entry("A", statistics.mean(v), statistics.stdev(v), values=v)
                     for v in (before, after))  # fmt: skip
    assert "+1.2 points" in compare(first, second)
    assert compare(first, second).endswith("beyond the spread of 0.8")
    other = second | {"row": "B"}
    assert compare(first, other).endswith("within the spread of 14.3")


def outcomes_of(plan, top1):
    """top1(row, seed) in %, on made-up runs."""
    return [running.Outcome(row.name, seed, {"top1": top1(row, seed) / 100}, "nowhere")
            for row, seed in plan.runs]  # fmt: skip


def test_the_table_says_what_its_verdicts_are_worth(tmp_path):
    plan = planned("sample-efficiency", seeds=3, fractions=[0.1, 1.0])
    rng = np.random.default_rng(0)
    _, text = write_tables(plan, outcomes_of(plan, lambda *_: 50 + rng.normal()), tmp_path)
    between, within = (int(x) for x in re.search(
        r"in (\d+) % of comparisons of two rows, (\d+) % within a row", text).groups())  # fmt: skip
    rows = rng.normal(size=(2, 200000, 3))
    difference = rows.mean(axis=2)[0] - rows.mean(axis=2)[1]
    beyond = np.abs(difference) > np.hypot(*rows.std(axis=2, ddof=1))
    assert between == pytest.approx(100 * beyond.mean(), abs=1)
    paired = np.abs(rows[0].mean(axis=1)) > rows[0].std(axis=1, ddof=1)
    assert within == pytest.approx(100 * paired.mean(), abs=1)
    assert between == round(200 * stats.t.sf(3**0.5, 4))


def test_one_seed_is_said_once(tmp_path):
    plan = planned("ablation", seeds=1, budget=500.0)
    _, text = write_tables(plan, outcomes_of(plan, lambda *_: 50.0), tmp_path)
    assert text.count("There is one seed") == text.count("no spread") == 1
    bullets = re.findall(r"^- .*$", text, re.MULTILINE)
    assert len(bullets) == 9
    assert all(re.search(r": [+]0\.0 points \(paper .*\)\.$", line) for line in bullets)


def test_the_gap_at_the_smallest_fraction_is_compared_with_that_at_the_largest(tmp_path):
    plan = planned("sample-efficiency", seeds=2, fractions=[0.3, 0.1, 1.0])
    means = {"convit-10pct": 40.0, "vit-10pct": 33.0, "convit-30pct": 0.0, "vit-30pct": 9.0}
    means |= {"convit-100pct": 70.0, "vit-100pct": 68.0}
    outcomes = outcomes_of(plan, lambda row, seed: means[row.name] + 0.5 * seed)
    text = write_tables(plan, outcomes, tmp_path)[1]
    assert re.findall(r"^\| (\w+, \d+) %", text, re.MULTILINE) == [
        f"{kind}, {percent}" for percent in (10, 30, 100) for kind in ("ConViT", "ViT")
    ]
    spread = hypot(*[statistics.stdev([0, 0.5])] * 4)
    assert (
        "gap ConViT - ViT is +7.0 points at 10 % and +2.0 points at 100 %: a change of +5.0 "
        f"points, beyond the spread of {spread:.1f} (paper +11.6 and +1.5)."
    ) in text


def test_each_experiment_compares_its_rows():
    def names(name):
        return [(a, b) for (a, qa), (b, qb) in _pairs(planned(name)) if qa == qb == "top1"]

    assert names("sample-efficiency") == [
        (f"convit-{p}pct", f"vit-{p}pct") for p in (5, 10, 30, 50, 100)
    ]
    assert names("ablation") == [*(("a", x) for x in "bcdefg"), ("d", "e"), ("f", "e"), ("g", "e")]
    deep, strong = "layers4-strength", "-strength1"
    assert names("locality") == [
        *((f"layers{n}{strong}", "layers0") for n in (1, 3, 4)),
        *((f"{deep}1", f"{deep}{weak}") for weak in (0.01, 0.1)),
    ]
    masked = [((row, "positional embedding masked"), (row, "top1")) for row in ("convit", "vit")]
    pairs = _pairs(planned("masking"))
    assert [pairs[0], pairs[-1]] == masked and len(pairs) == 8
    assert all(a[0] == b[0] and b[1] == "top1" for a, b in pairs)
    first, *pairs = _pairs(planned("escape"))
    assert first == (("convit", "top1"), ("vit", "top1"))
    end, start = "nonlocality of layer 1 at the end", "nonlocality of layer 1 before training"
    assert pairs[:2] == [(("convit", end), ("convit", start)), (("convit", end), ("vit", end))]
    assert len(pairs) == 3 * 4


def test_tables_before_all_runs_are_done(tmp_path):
    plan = planned("sample-efficiency", seeds=2, fractions=[0.1, 1.0])
    some = outcomes_of(plan, lambda row, seed: 50.0)[:5]
    entries, text = write_tables(plan, some, tmp_path)
    assert [e["seeds"] for e in entries] == [2, 1, 1, 1]
    assert "5 of 8 runs" in text and "a single run has no spread" in text
    text = write_tables(plan, some[:1], tmp_path)[1]
    assert text.count("| no run |") == 3 and "every run of ViT, 10 % is still to come" in text
    pytest.importorskip("matplotlib")
    assert draw(plan, some[:1], entries_of(plan, some[:1]), tmp_path) == ["sample-efficiency.png"]


# The command.


def command(name, out, *argv, budget=16, seeds=2):
    return [name, "--data", "shapes", "--budget", budget, "--seeds", seeds, "--out", out, *argv]


def rows_in(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def table_of(folder):
    """{(row, quantity): line} of table.csv."""
    with open(folder / "table.csv") as file:
        return {(line["row"], line["quantity"]): line for line in csv.DictReader(file)}


def test_tables_are_what_the_runs_say(small, tmp_path, program):
    argv = command("sample-efficiency", "x", "--fractions", "1,0.7", budget=10)
    status, out, err = program(*argv)
    assert (status, err) == (0, "")
    plan, folder = load_plan("x/plan.json"), tmp_path / "x"
    assert [row.images for row in plan.rows] == [100, 100, 70, 70]
    assert f"8 runs of {plan.steps} steps, {plan.images_seen} images each" in out
    lines = table_of(folder)
    for row in plan.rows:
        values = []
        for seed in range(2):
            run = rows_in(folder / row.name / f"seed{seed}")
            settings = json.loads((folder / row.name / f"seed{seed}/config.json").read_text())
            assert settings["settings"]["seed"] == seed
            assert run[-1]["step"] * settings["settings"]["batch_size"] == plan.images_seen
            values.append(100 * run[-1]["val_top1"])
        line = lines[row.name, "top1"]
        assert float(line["mean"]) == pytest.approx(statistics.mean(values))
        assert float(line["spread"]) == pytest.approx(statistics.stdev(values))
        assert [float(x) for x in line["values"].split(";")] == pytest.approx(values)
        assert (line["seeds"], line["images"]) == ("2", str(row.images))
        mean = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
        passes = f"{plan.images_seen / row.images:.1f}"
        paper = f"{float(line['paper']):.1f}" if line["paper"] else ""
        seeds = ", ".join(f"{value:.1f}" for value in values)
        assert f"| {row.label} | {mean} | 2 | {row.images} | {passes} | {paper} | {seeds} |" in out
    assert [line["paper"] for line in lines.values()] == ["", "", "81.4", "79.9"]
    assert (folder / "sample-efficiency.png").stat().st_size > 10000
    text = (folder / "table.md").read_text()
    assert text in out and "trained on the CPU. Each has" in text
    for words in ("recipe shapes-minute: batches of 64, optimizer adamw, peak learning rate 0.002, "
                  "augmentation none, weight decay 0.05",):  # fmt: skip
        assert words in text and words in out[: out.index("ConViT, 100 %, seed 0")]
    assert program(*argv)[0] == 0


def test_a_finished_plan_is_not_trained_again_and_replays_equal(small, tmp_path, program):
    argv = command("masking", "x", seeds=1, budget=5)
    assert program(*argv)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(before) == 2 * 2
    text = (tmp_path / "x/table.csv").read_bytes()
    assert program(*argv)[0] == 0
    assert program("masking", "--out", "x")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "measure", None)
        assert program("masking", "--plan", "x/plan.json", "--out", "y")[0] == 0
    for name in ("plan.json", "table.csv", "table.md"):
        assert (tmp_path / "y" / name).read_bytes() == (tmp_path / "x" / name).read_bytes()
    assert text == (tmp_path / "x/table.csv").read_bytes()


def test_the_data_are_found_again_where_they_were(small, tmp_path, program, monkeypatch):
    seen = []

    def load(_name, folder=None, _download=True, subset=1.0, *_args, **_kwargs):
        seen.append(folder)
        return without_test(subset=subset)

    monkeypatch.setattr(running, "load_dataset", load)
    monkeypatch.setattr("miniconvit.training.run.load_dataset", load)
    argv = command("escape", "x", "--subset", 1, seeds=1, budget=5)
    assert program(*argv, "--data-dir", "data")[0] == 0
    seen.clear()
    assert program("escape", "--out", "x")[0] == 0
    assert set(seen) == {tmp_path / "data"}
    assert "data" not in json.loads((tmp_path / "x/plan.json").read_text()).get("data_dir", "")
    seen.clear()
    assert program("escape", "--plan", "x/plan.json", "--out", "y")[0] == 0
    assert set(seen) == {None}


class Kill(BaseException):
    """Nothing is saved on its way."""


@pytest.mark.parametrize(
    "how, moment", [("kill", 3), ("kill", 20), (signal.SIGTERM, 20), (signal.SIGINT, 3)]
)
def test_killed_and_resumed(small, tmp_path, program, monkeypatch, how, moment):
    argv = command("escape", "x", "--subset", 1, budget=8, seeds=1)
    assert program(*[*argv[:-3], "whole", *argv[-2:]])[0] == 0
    assert 4 < load_plan("whole/plan.json").steps < 20  # one moment in each of two runs
    steps, real = iter(range(1, 999)), ImageArray.training_view

    def stop(*arguments):
        if next(steps) == moment:
            if how == "kill":
                raise Kill
            signal.raise_signal(how)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ImageArray, "training_view", stop)
        if how == "kill":
            with pytest.raises(Kill):
                program(*argv)
        else:
            status, _, err = program(*argv)
            assert status == 128 + how
            assert "saved; go on with: miniconvit experiment escape --out x" in err
    assert (tmp_path / "x/table.md").exists() == (moment == 20)  # after the first run
    assert program("escape", "--out", "x")[0] == 0
    for name in ("table.csv", "table.md"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("moment", ["planning", "half a plan", "between runs"])
def test_killed_where_no_run_is(small, tmp_path, program, monkeypatch, moment):
    argv = command("escape", "x", "--subset", 1, "--data-dir", ".", budget=8, seeds=1)

    def kill(*_args, **_kwargs):
        if moment == "half a plan":
            (tmp_path / "x/plan.json.partial").write_text('{"asked": {"exp')
        raise Kill

    with monkeypatch.context() as patch, pytest.raises(Kill):
        where = {"planning": (running, "measure"), "half a plan": (planning, "write_file")}
        patch.setattr(*where.get(moment, (experiment_command, "write_tables")), kill)
        program(*argv)
    assert (tmp_path / "x").exists() == (moment != "planning")
    assert program(*argv)[0] == 0
    assert len(table_of(tmp_path / "x")) > 4


def test_a_run_that_diverges_is_reported_and_the_others_go_on(small, tmp_path, program):
    argv = command("sample-efficiency", "x", "--fractions", "1", budget=5)
    assert program(*argv)[0] == 0
    values = json.loads((tmp_path / "x/plan.json").read_text())
    values["rows"][0]["settings"]["lr"] = 1e30
    (tmp_path / "wild.json").write_text(json.dumps(values))
    argv = ("sample-efficiency", "--plan", "wild.json", "--out", "y")
    status, out, _ = program(*argv)
    assert status == 0
    assert "| ConViT, 100 % | diverged | 0 |" in out
    assert "no comparison, as every run of ConViT, 100 % diverged" in out
    (line,) = re.findall(r"^\| ViT.*$", (tmp_path / "x/table.md").read_text(), re.MULTILINE)
    assert line in out.splitlines()
    mark = (tmp_path / "y/convit-100pct/seed0/diverged.txt").read_text()
    assert re.fullmatch(r"stopped at step \d+ \(epoch 1\): [^;/]*\n", mark)
    log = (tmp_path / "y/convit-100pct/seed0/log.txt").read_bytes()
    assert program(*argv)[1].splitlines()[-12:] == out.splitlines()[-12:]
    assert (tmp_path / "y/convit-100pct/seed0/log.txt").read_bytes() == log


def test_masks_are_applied_to_the_last_parameters(small, tmp_path, program):
    assert program(*command("masking", "x", seeds=1, budget=5))[0] == 0
    for path in tmp_path.rglob("best.safetensors"):
        best = load_checkpoint(path)
        save_checkpoint(path, {name: 0 * p for name, p in best.params.items()}, best.config)
    assert program("masking", "--out", "x")[0] == 0
    lines = {quantity: line for (row, quantity), line in table_of(tmp_path / "x").items()
             if row == "convit"}  # fmt: skip
    model, data = load_checkpoint(tmp_path / "x/convit/seed0/last.safetensors"), small_dataset()
    images = normalize(data.val.images, data.mean, data.std)
    masked = {"positional embedding masked": without_pos_embed(model.params)}
    masked |= {
        f"{branch} masked in layer{words}": without_branch(model.params, branch, n)
        for branch in ("content", "position")
        for n, words in ((1, " 1"), (2, "s 1 to 2"))
    }
    assert set(lines) == {"top1", *masked}
    for name, params in masked.items():
        logits, _ = convit_forward(images, params, model.config)
        right = (logits.argmax(axis=1) == data.val.labels).mean()
        assert float(lines[name]["mean"]) == pytest.approx(100 * right), name


def test_escape_reads_the_metrics(small, tmp_path, program):
    assert program(*command("escape", "x", "--subset", 1, seeds=1, budget=4))[0] == 0
    run = {quantity: float(line["mean"]) for (row, quantity), line in
           table_of(tmp_path / "x").items() if row == "convit"}  # fmt: skip
    row = rows_in(tmp_path / "x/convit/seed0")[-1]
    for i in (1, 2):
        found = run[f"nonlocality of layer {i} at the end"], run[f"gate of layer {i} at the end"]
        expected = statistics.mean(row["nonlocality"][i - 1]), statistics.mean(row["gates"][i - 1])
        assert found == pytest.approx(expected)
        assert run[f"gate of layer {i} before training"] == pytest.approx(
            1 / (1 + np.exp(-1)), abs=1e-5
        )
    assert (tmp_path / "x/escape.png").exists() and (tmp_path / "x/escape-gates.png").exists()


@pytest.mark.parametrize(("seconds", "drawn"), [(-1.0, [1, 2]), (3600.0, [2])])
def test_after_a_short_run_there_are_tables_and_in_the_end_a_picture(
    small, program, monkeypatch, seconds, drawn
):
    seen, written = [], []

    def count(into, function):
        def counted(plan, outcomes, *rest):
            into.append(len(outcomes))
            return function(plan, outcomes, *rest)

        return counted

    monkeypatch.setattr(experiment_command, "SHORT_RUN", seconds)
    monkeypatch.setattr(experiment_command, "draw", count(seen, lambda *_: []))
    monkeypatch.setattr(experiment_command, "write_tables", count(written, write_tables))
    argv = command("escape", "x", "--subset", 1, seeds=1, budget=8)  # ConViT, then its twin
    assert program(*argv)[0] == 0
    assert (seen, written) == (drawn, [1, 2])


def test_without_matplotlib_there_are_tables_and_later_a_picture(
    small, tmp_path, program, monkeypatch
):
    argv = command("locality", "x", "--subset", 1, seeds=1, budget=10)
    with monkeypatch.context() as patch:
        patch.setattr("miniconvit.analysis.style.find_spec", lambda name: None)
        status, _, err = program(*argv)
    assert status == 0
    assert err == (
        "no picture will be drawn: pictures need matplotlib, which is missing: pip install "
        "matplotlib\n"
    )
    assert (tmp_path / "x/table.md").exists() and not (tmp_path / "x/locality.png").exists()
    pytest.importorskip("matplotlib")
    assert program(*argv)[0] == 0
    assert (tmp_path / "x/locality.png").exists()


def test_a_mask_that_leaves_no_finite_answer_is_reported(tmp_path):
    plan = planned("masking", seeds=2)
    outcomes = []
    for row, seed in plan.runs:
        values = {"top1": 0.5} | {running.mask_name(mask): 0.4 for mask in row.masks}
        values["positional embedding masked"] = None if seed else 0.25
        outcomes.append(running.Outcome(row.name, seed, values))
    text = write_tables(plan, outcomes, tmp_path)[1]
    assert "| ConViT, positional embedding masked | 25.0 (1 diverged) | 1 |" in text
    assert "without a verdict" in text


@pytest.mark.parametrize("name", ["ablation", "masking", "sample-efficiency"])
def test_figures_and_papers_numbers(name, tmp_path):
    """Also where the runs of one row have all diverged."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    plan, outcomes = planned(name, budget=600.0), []
    for row in plan.rows:
        values = {"top1": 0.5} | {running.mask_name(mask): 0.4 for mask in row.masks}
        if row is plan.rows[-1]:
            values = None
        outcomes += [running.Outcome(row.name, seed, values) for seed in plan.seeds]
    entries, text = write_tables(plan, outcomes, tmp_path)
    names = draw(plan, outcomes, entries, tmp_path)
    assert names == [f"{name}.png"]
    with image.open(tmp_path / names[0]) as picture:
        assert picture.width >= 2000 and round(picture.info["dpi"][0]) == 300
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 50
    papers = [e["paper"] for e in entries]
    assert (
        papers
        == {
            "ablation": [59.7, 57.4, 56.9, 54.6, 47.8, 54.3, 44.8],
            "masking": [73.1, 67.1, 62.3, 35.0, 1.3, 63.5, 53.1, 46.8, 72.2, 38.3],
            "sample-efficiency": [47.8, 34.8, 59.6, 48.0, 73.7, 66.1, 78.2, 74.6, 81.4, 79.9],
        }[name]
    )
    assert text.count("diverged") >= 2


def test_the_papers_numbers_stand_beside_its_shares_alone():
    for subset, first in ((0.1, 59.7), (1.0, 82.2), (0.3, None)):
        assert entries_of(planned("ablation", subset=subset), [])[0]["paper"] == first
    assert entries_of(planned("masking", subset=0.1), [])[0]["paper"] is None


def test_measuring_takes_medians_of_short_epochs(small, monkeypatch):
    monkeypatch.undo()
    speeds = iter([[10.0, 100.0], [90.0, 50.0, 100.0, 400.0, 95.0]])
    seen = []

    def train(settings, *_args, **_kwargs):
        seen.append(settings)
        size = settings.batch_size
        return SimpleNamespace(rows=[
            {"step": 6, "images_per_second": v, "seconds": 6 * size / v + 0.25 + 0.5 * (v > 100)}
            for v in next(speeds)
        ])  # fmt: skip

    monkeypatch.setattr(running, "train", train)
    row = rows_of(complete("escape", {"data": "shapes"}))[0]
    found = running.measure(replace(row.settings, batch_size=2), 10000)
    assert found["images_per_second"] == 95.0
    assert found["validation_seconds"] == pytest.approx(0.25)
    assert [s.epochs for s in seen] == [2, 5]
    seconds = 5 * seen[1].subset * 10000 / 100.0
    assert seconds >= 5


def test_measuring_really_trains(small, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("miniconvit.training.run.load_dataset", lambda *_: without_test())
    monkeypatch.setattr(running, "TIMED_SECONDS", 0.1)
    monkeypatch.setitem(VARIANTS, "convit_micro32", SMALL)
    row = rows_of(complete("escape", {"data": "shapes"}))[0]
    settings = replace(row.settings, batch_size=16)
    found = running.measure(settings, 100, data_dir=None, workers=1, device="cpu")
    assert set(found) == {"images_per_second", "validation_seconds", "start_seconds"}
    assert all(value > 0 for value in found.values())


def test_the_row_of_which_everything_is_trained_is_timed(small, monkeypatch):
    seen = []

    def measure(settings, *_args, **_where):
        seen.append(settings)
        return fake_speed(settings)

    monkeypatch.setattr(running, "measure", measure)
    asked = complete("ablation", {"data": "shapes", "budget": 500.0, "subset": 1.0})
    running.new_plan(asked, str, data_dir=None, workers=1, device="cpu")
    assert [(s.model, s.freeze) for s in seen] == [("convit_micro32", None), ("vit_micro32", None)]


MISTAKES = {
    "unknown name": (["melody"], "melody"),
    "unknown data": (["escape", "--data", "mnist"], "mnist"),
    "a twin": (["escape", "--model", "vit_micro32"], "its ViT twin comes by itself"),
    "unknown model": (["escape", "--model", "resnet"], "resnet"),
    "no minutes": (["escape", "--budget", "0"], "positive number of minutes"),
    "no seeds": (["escape", "--seeds", "0"], "--seeds"),
    "no fractions": (["sample-efficiency", "--fractions", "all"], "like 0.1,1.0"),
    "too large a fraction": (["sample-efficiency", "--fractions", "0.1,2"], "at most 1"),
    "another's option": (["ablation", "--fractions", "0.1"], "ablation takes --subset"),
    "no plan": (["ablation", "--plan", "nothing.json"], "nothing.json cannot be read"),
    "no plan's content": (
        ["ablation", "--plan", "list.json"],
        "list.json cannot be read (it holds",
    ),
    "a full folder": (["ablation", "--out", "."], "holds no plan"),
    "too few minutes": (
        ["ablation", "--data", "shapes", "--subset", "1", "--budget", "1"],
        "do not fit",
    ),
    "a small share": (["ablation", "--data", "shapes"], "are 9 images, fewer than a batch of 64"),
    "steps and minutes": (["escape", "--steps", "9", "--budget", "9"], "give one of them"),
    "no steps": (["escape", "--steps", "0"], "--steps must be an integer of at least 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(small, tmp_path, program, mistake):
    (tmp_path / "list.json").write_text("[]")
    argv, words = MISTAKES[mistake]
    status, _, err = program(*argv)
    assert status == 2
    assert re.fullmatch(r"Error: [^\n]+\n", err) and words in err
    assert [file.name for file in tmp_path.iterdir()] == ["list.json"]


def test_another_plan_in_the_folder_is_refused(small, tmp_path, program):
    argv = command("escape", "x", "--subset", 1, seeds=1, budget=4)
    assert program(*argv)[0] == 0
    values = json.loads((tmp_path / "x/plan.json").read_text())
    values["rows"][0]["settings"]["lr"] = 1e-3
    (tmp_path / "other.json").write_text(json.dumps(values))
    for given, words in (
        ([*argv, "--budget", 39], "--budget 4.0, not 39.0"),
        (["escape", "--out", "x", "--seeds", 2], "--seeds 1, not 2"),
        (["escape", "--out", "x", "--steps", 8], "made without --steps"),
        (["ablation", "--out", "x"], "another plan (escape, not ablation)"),
        (["escape", "--plan", "other.json", "--out", "x"], "holds another plan"),
        (["ablation", "--plan", "other.json"], "a plan of escape"),
        (["escape", "--plan", "other.json", "--seeds", 2], "leave out --seeds"),
    ):
        status, _, err = program(*given)
        assert status == 2 and words in err
        assert re.fullmatch(r"Error: [^\n]+\n", err)


SPOILT = {
    "no seeds": lambda plan: plan["asked"].pop("seeds"),
    "text for seeds": lambda plan: plan["asked"].update(seeds="3"),
    "another experiment": lambda plan: plan["asked"].update(experiment="ablation"),
    "unknown experiment": lambda plan: plan["asked"].update(experiment="melody"),
    "another model": lambda plan: plan["asked"].update(model="convit_tiny32"),
    "a row less": lambda plan: plan["rows"].pop(),
    "another mask": lambda plan: plan["rows"][0]["masks"].append(["taste", 1]),
    "no images": lambda plan: plan["rows"][0].update(images=0),
    "text for speed": lambda plan: plan["rows"][0]["speed"].update(images_per_second="fast"),
    "no speed": lambda plan: plan["rows"][0].update(speed=None),
    "another length": lambda plan: plan["rows"][0]["settings"].update(steps=9),
    "no device": lambda plan: plan.pop("measured_on"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_plan_is_refused(tmp_path, how):
    path = tmp_path / "plan.json"
    planned("masking").save(path)
    assert load_plan(path).asked["seeds"] == 3
    values = json.loads(path.read_text())
    SPOILT[how](values)
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="is damaged, or no plan"):
        load_plan(path)


def test_similarities_are_halved_or_not_seed_by_seed():
    plan = planned("diversity", budget=500.0, seeds=3)
    last = {"vit": (0.6, 0.7, 0.8), "vit-cosine": (0.3, 0.36, 0.2), "vit-all": (0.1, 0.1, 0.1)}
    last |= {"convit": (0.5, 0.5, 0.5), "convit-cosine": (0.5, 0.6, 0.7)}
    outcomes = [
        running.Outcome(
            row.name,
            seed,
            {"top1": 0.4, running.FIRST_LAYER: 0.5, running.LAST_LAYER: last[row.name][seed]},
            history=(0.5, last[row.name][seed]),
        )
        for row, seed in plan.runs
    ]
    entries = {(e["row"], e["quantity"]): e for e in entries_of(plan, outcomes)}
    said = list(_halved(plan, entries))
    assert "in 2 of 3 seeds: to 0.50, 0.51, 0.25 of it" in said[0]
    assert "in 3 of 3 seeds" in said[1] and "in 0 of 3 seeds: to 1.00, 1.20, 1.40" in said[2]


def test_a_small_plan_of_diversity_is_trained_read_and_drawn(small, tmp_path, program):
    argv = command("diversity", "x", seeds=1, budget=5)
    status, out, err = program(*argv, "--model", "convit_micro32")
    assert status == 0, err
    folder = tmp_path / "x"
    lines = list(csv.DictReader((folder / "table.csv").open()))
    found = {(line["row"], line["quantity"]): float(line["mean"]) for line in lines}
    assert len(found) == 5 * 3
    alike = [value for (_, quantity), value in found.items() if "similarity" in quantity]
    assert all(0 < value < 1 for value in alike)
    assert "of 1 seed: to" in out and (folder / "diversity.png").stat().st_size > 10000


def outcomes_of_hybrid(plan, top1):
    """top1: row's kind to a function of its seed."""
    return [
        running.Outcome(row.name, seed, {"top1": top1[row.name.rpartition("-")[0]](seed)},
                        parameters=100)
        for row, seed in plan.runs
    ]  # fmt: skip


@pytest.mark.parametrize(("convit", "said"), [(0.3, "2 of 2"), (0.5, "0 of 2")])
def test_cmt_is_ahead_of_both_or_not_share_by_share(convit, said):
    plan = planned("hybrid", budget=500.0, seeds=3, fractions=[0.1, 1.0])
    top1 = {"vit": lambda seed: 0.3 + 0.01 * seed, "convit": lambda seed: convit}
    top1 |= dict.fromkeys(("cmt", "cmt-nolocal", "cmt-nofilter"), lambda seed: 0.4 + 0.01 * seed)
    entries = entries_of(plan, outcomes_of_hybrid(plan, top1))
    by_name = {(e["row"], e["quantity"]): e for e in entries}
    assert list(_ahead(plan, by_name)) == [
        f"CMT is ahead of both beyond the spread at {said} shares"
    ]
    assert len(_pairs(plan)) == 8
    speeds = {row.name: row.speed["images_per_second"] for row in plan.rows}
    assert len(set(speeds.values())) > 1
    for e in entries:
        assert (e["parameters"], e["images_per_second"]) == (100, speeds[e["row"]])


def test_a_small_plan_of_hybrid_is_trained_read_and_drawn(small, tmp_path, program, monkeypatch):
    stages = {"embed_dims": (6, 8), "depths": (1, 1), "num_heads": (1, 2), "sr_ratios": (2, 1)}
    for end, more in (
        ("", {}),
        ("_nolocal", {"local": False}),
        ("_nofilter", {"ff_filter": False}),
    ):
        monkeypatch.setitem(CMT_VARIANTS, f"cmt_micro32{end}", CMTConfig(8, **stages, **more))
    argv = command("hybrid", "x", seeds=2, budget=20)
    status, out, err = program(*argv, "--model", "convit_micro32", "--fractions", "0.7,1")
    assert status == 0, err
    folder = tmp_path / "x"
    assert (folder / "hybrid.png").stat().st_size > 10000
    lines = list(csv.DictReader((folder / "table.csv").open()))
    assert len(lines) == 10 and all(float(line["images_per_second"]) > 0 for line in lines)
    assert "| parameters | images/s |" in out and "of 2 shares" in out
    assert program(*argv)[0] == 0  # nothing is trained again
