"""The paper's experiments: what they plan, that they go on after a kill, and what they say."""

import csv
import json
import re
import signal
import statistics
from dataclasses import replace
from math import ceil
from types import SimpleNamespace

import numpy as np
import pytest
from small_run import small_dataset

import miniconvit.experiments.run as running
import miniconvit.train as training
from miniconvit import VARIANTS, UserError, cli
from miniconvit.ablation import without_branch, without_pos_embed
from miniconvit.checkpoint import load_checkpoint
from miniconvit.data import normalize
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
from miniconvit.experiments.tables import compare, write_tables
from miniconvit.model import convit_forward

SMALL = replace(VARIANTS["convit_micro32"], img_size=8, embed_dim=16, depth=3, local_up_to_layer=2)


def without_test(*_args, subset=1.0, **_kwargs):
    """The small data set without its test split, whose training images are cut class by class."""
    data = small_dataset()
    labels = data.train.labels
    nth = np.array([(labels[:i] == label).sum() for i, label in enumerate(labels)])
    total = np.array([(labels == label).sum() for label in labels])
    kept = nth < np.round(subset * total)
    data.train = SimpleNamespace(images=data.train.images[kept], labels=labels[kept])
    data.test = None
    return data


def fake_speed(settings, *_args, **_where):
    """A step of 64 images takes a ConViT 16 s and a ViT 8 s, on no clock at all."""
    per_second = 4.0 if settings.local_up_to_layer else 8.0
    return {"images_per_second": per_second, "validation_seconds": 1.0, "start_seconds": 5.0}


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "load_dataset", lambda _name, _dir, _download, subset, *_: (
        without_test(subset=subset)
    ))  # fmt: skip
    monkeypatch.setattr(running, "load_dataset", without_test)
    monkeypatch.setattr(running, "measure", fake_speed)
    monkeypatch.setattr("miniconvit.experiments.plan.LEAST_STEPS", 4)
    monkeypatch.setattr("miniconvit.experiments.plan.VALIDATIONS", (3, 2))
    monkeypatch.setitem(VARIANTS, "convit_micro32", SMALL)
    monkeypatch.setitem(VARIANTS, "vit_micro32", replace(SMALL, local_up_to_layer=0))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def program(capsys):
    """Calls `experiment` on the CPU: (exit status, standard output, standard error)."""

    def call(*argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main(["experiment", *map(str, argv), "--device", "cpu", "--threads", "1"])
        return end.value.code, *capsys.readouterr()

    return call


# The plan.


def planned(name, model="convit_tiny32", **given):
    asked = complete(name, {"model": model} | given)
    rows = rows_of(asked)
    images = {row.settings.subset: int(45000 * row.settings.subset) for row in rows}
    speeds = {
        speed_key(row.settings): {
            "images_per_second": 300.0 + 40 * row.settings.local_up_to_layer,
            "validation_seconds": 2.0 + row.settings.local_up_to_layer,
            "start_seconds": 1.5,
        }
        for row in rows
    }
    return make_plan(asked, rows, images, speeds, "nowhere")


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("budget, seeds", [(50.0, 1), (333.0, 3), (10000.0, 2)])
def test_a_plan_fits_its_budget_and_uses_it(name, budget, seeds):
    plan = planned(name, budget=budget, seeds=seeds)
    seconds, steps, warmups = 0.0, set(), []
    for row in plan.rows:
        s, speed = row.settings, row.speed
        assert row.images == int(45000 * s.subset)
        assert (s.batch_size, s.epochs) == (64, None)
        epoch = s.passes * (row.images // 64)
        validations = ceil(s.steps / epoch)
        assert 1 <= validations <= 20
        seconds += 1.5 + 64 * s.steps / speed["images_per_second"]
        seconds += (validations + len(row.masks)) * speed["validation_seconds"]
        steps.add(s.steps)
        warmups.append(s.warmup_epochs * epoch)
    assert len(steps) == 1
    assert plan.images_seen == 64 * steps.pop()
    np.testing.assert_allclose(warmups, 0.1 * plan.steps)
    assert plan.minutes == pytest.approx(seeds * seconds / 60)
    assert 0.75 * budget < plan.minutes <= 0.9 * budget
    assert plan.seeds == list(range(seeds))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_budget_too_small_names_one_that_is_large_enough(name):
    with pytest.raises(UserError, match=r"runs do not fit into --budget 0\.5:") as error:
        planned(name, budget=0.5)
    enough = float(re.search(r"they take ([\d.]+) minutes", str(error.value))[1])
    assert planned(name, budget=enough).steps >= 200
    with pytest.raises(UserError):
        planned(name, budget=0.97 * enough - 0.1)


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
    twin = {"model": "vit_tiny32", "local_up_to_layer": 0}
    expected = {"a": {}, "b": {"freeze": "gates"}, "c": random, "d": {"freeze": "gates"} | random}
    expected |= {"e": twin, "f": frozen, "g": frozen | random}
    assert {name: changes(row, rows["a"]) for name, row in rows.items()} == expected
    assert {row.settings.subset for row in rows.values()} == {0.1}


def test_the_other_experiments_have_their_rows():
    twin = {"model": "vit_tiny32", "local_up_to_layer": 0}
    rows = planned("sample-efficiency", budget=500.0, fractions=[1.0, 0.05, 0.3]).rows
    assert [row.settings.subset for row in rows] == [0.05, 0.05, 0.3, 0.3, 1.0, 1.0]
    assert [changes(b, a) for a, b in zip(rows[::2], rows[1::2], strict=True)] == [twin] * 3
    rows = planned("locality", budget=500.0).rows
    found = [(row.settings.local_up_to_layer, row.settings.locality_strength) for row in rows]
    assert found == [(0, 1.0)] + [(n, a) for n in (3, 6, 9) for a in (0.01, 0.1, 1.0)]
    convit, vit = planned("masking", budget=500.0).rows
    assert changes(vit, convit) == twin
    assert vit.masks == [["pos_embed"]]
    depths = [[branch, n] for branch in ("content", "position") for n in (3, 5, 10)]
    assert convit.masks == [["pos_embed"], *depths]
    assert masked_layers(VARIANTS["convit_micro32"]) == {3: 1, 5: 2, 10: 3}
    convit, vit = planned("escape", budget=500.0).rows
    assert (changes(vit, convit), convit.settings.subset) == (twin, 1.0)


def test_a_subset_smaller_than_a_batch_makes_the_batches_of_all_rows_small():
    asked = complete("sample-efficiency", {"fractions": [0.1, 1.0], "budget": 4000.0})
    rows = rows_of(asked)
    speeds = {speed_key(row.settings): fake_speed(row.settings) for row in rows}
    plan = make_plan(asked, rows, {0.1: 23, 1.0: 230}, speeds, "nowhere")
    assert {row.settings.batch_size for row in plan.rows} == {23}
    assert {row.settings.steps for row in plan.rows} == {plan.images_seen // 23}


# What is said of a difference.


def entry(label, mean, spread=None, paper=None, diverged=0, unit="%"):
    return {"label": label, "quantity": "top1", "unit": unit, "mean": mean, "spread": spread,
            "paper": paper, "diverged": diverged}  # fmt: skip


@pytest.mark.parametrize(
    "first, second, within, words",
    [
        ((50.0, 0.3, 59.6), (49.5, 0.4, 48.0), True, r"\+0.5 points .* within the spread of 0.5; "
         r"paper \+11.6$"),
        ((50.0, 0.3, None), (49.4, 0.4, 48.0), False, "beyond the spread of 0.5$"),
        ((49.4, 0.4), (50.0, 0.3), False, "^A against B: -0.6 points .*beyond the spread"),
        ((50.0, None), (40.0, 0.4), None, "a single run has no spread"),
        ((49.98, 0.1), (50.0, 0.1), True, r": \+0.0 points"),
        ((None, None, None, 3), (40.0, 0.4), None, "no comparison, as every run of A diverged$"),
    ],
)  # fmt: skip
def test_a_difference_within_the_spread_is_called_that(first, second, within, words):
    found = compare(entry("A", *first), entry("B", *second))
    assert re.search(words, found["sentence"])
    assert found["within_spread"] is within


# The command.


def command(name, out, *argv, budget=16, seeds=2):
    return [name, "--data", "shapes", "--budget", budget, "--seeds", seeds, "--out", out, *argv]


def rows_in(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_tables_are_what_the_runs_say(small, tmp_path, program):
    status, out, err = program(*command("sample-efficiency", "x", "--fractions", "0.3,1", budget=8))
    assert (status, err) == (0, "")
    plan, folder = load_plan("x/plan.json"), tmp_path / "x"
    assert [row.images for row in plan.rows] == [30, 30, 100, 100]
    assert f"8 runs of {plan.steps} steps, {plan.images_seen} images each" in out
    entries = json.loads((folder / "table.json").read_text())["entries"]
    with open("x/table.csv") as file:
        lines = list(csv.DictReader(file))
    for row, found, line in zip(plan.rows, entries, lines, strict=True):
        values = []
        for seed in range(2):
            run = rows_in(folder / row.name / f"seed{seed}")
            settings = json.loads((folder / row.name / f"seed{seed}/config.json").read_text())
            assert settings["settings"]["seed"] == seed
            assert run[-1]["step"] * settings["settings"]["batch_size"] == plan.images_seen
            values.append(100 * run[-1]["val_top1"])
        assert found["mean"] == pytest.approx(statistics.mean(values))
        assert found["spread"] == pytest.approx(statistics.stdev(values))
        assert (found["seeds"], found["images"]) == (2, row.images)
        assert float(line["mean"]) == found["mean"]
        mean = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
        assert f"| {row.label} | {mean} | 2 | {row.images} | {plan.images_seen} |" in out
    assert [e["paper"] for e in entries] == [73.7, 66.1, 81.4, 79.9]
    assert (folder / "sample-efficiency.png").stat().st_size > 10000
    assert (folder / "table.md").read_text() in out


def test_a_finished_plan_is_not_trained_again_and_replays_equal(small, tmp_path, program):
    argv = command("masking", "x", "--subset", 1, seeds=1, budget=5)
    assert program(*argv)[0] == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(before) == 2 * 2
    text = (tmp_path / "x/table.csv").read_bytes()
    assert program(*argv)[0] == 0
    assert program("masking", "--resume", "--out", "x")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "measure", None)
        assert program("masking", "--plan", "x/plan.json", "--out", "y")[0] == 0
    for name in ("plan.json", "table.csv", "table.md"):
        assert (tmp_path / "y" / name).read_bytes() == (tmp_path / "x" / name).read_bytes()
    assert text == (tmp_path / "x/table.csv").read_bytes()


class Kill(BaseException):
    """Nothing is saved on its way."""


@pytest.mark.parametrize(
    "how, moment", [("kill", 3), ("kill", 20), (signal.SIGTERM, 20), (signal.SIGINT, 3)]
)
def test_killed_and_resumed(small, tmp_path, program, monkeypatch, how, moment):
    argv = command("escape", "x", "--subset", 1, budget=8, seeds=1)
    assert program(*[*argv[:-3], "whole", *argv[-2:]])[0] == 0
    assert 4 < load_plan("whole/plan.json").steps < 20  # one moment in each of two runs
    steps, real = iter(range(1, 999)), training.training_images

    def stop(*arguments):
        if next(steps) == moment:
            if how == "kill":
                raise Kill
            signal.raise_signal(how)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "training_images", stop)
        if how == "kill":
            with pytest.raises(Kill):
                program(*argv)
        else:
            status, _, err = program(*argv)
            assert status == 128 + how
            assert "saved; go on with: miniconvit experiment escape --resume --out x" in err
    assert not (tmp_path / "x/table.md").exists()
    assert program("escape", "--resume", "--out", "x")[0] == 0
    for name in ("table.csv", "table.md", "table.json"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


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
    log = (tmp_path / "y/convit-100pct/seed0/log.txt").read_bytes()
    assert program(*argv)[1].splitlines()[-12:] == out.splitlines()[-12:]
    assert (tmp_path / "y/convit-100pct/seed0/log.txt").read_bytes() == log


def test_masks_are_applied_to_the_last_parameters(small, tmp_path, program):
    assert program(*command("masking", "x", "--subset", 1, seeds=1, budget=5))[0] == 0
    for path in tmp_path.rglob("best.safetensors"):
        path.unlink()
    assert program("masking", "--resume", "--out", "x")[0] == 0
    run = json.loads((tmp_path / "x/table.json").read_text())["runs"][0]
    model, data = load_checkpoint(tmp_path / "x/convit/seed0/last.safetensors"), small_dataset()
    images = normalize(data.val.images, data.mean, data.std)
    masked = {"positional embedding masked": without_pos_embed(model.params)}
    masked |= {
        f"{branch} masked in layer{words}": without_branch(model.params, branch, n)
        for branch in ("content", "position")
        for n, words in ((1, " 1"), (2, "s 1 to 2"))
    }
    assert set(run["values"]) == {"top1", *masked}
    for name, params in masked.items():
        logits, _ = convit_forward(images, params, model.config)
        right = (logits.argmax(axis=1) == data.val.labels).mean()
        assert run["values"][name] == pytest.approx(right), name


def test_escape_reads_the_metrics(small, tmp_path, program):
    assert program(*command("escape", "x", "--subset", 1, seeds=1, budget=4))[0] == 0
    run = json.loads((tmp_path / "x/table.json").read_text())["runs"][0]["values"]
    row = rows_in(tmp_path / "x/convit/seed0")[-1]
    for i in (1, 2):
        found = run[f"nonlocality of layer {i} at the end"], run[f"gate of layer {i} at the end"]
        expected = statistics.mean(row["nonlocality"][i - 1]), statistics.mean(row["gates"][i - 1])
        assert found == pytest.approx(expected)
        assert run[f"gate of layer {i} at first"] == pytest.approx(1 / (1 + np.exp(-1)), abs=1e-5)
    assert (tmp_path / "x/escape.png").exists() and (tmp_path / "x/escape-gates.png").exists()


def test_without_matplotlib_there_are_tables_and_later_a_picture(
    small, tmp_path, program, monkeypatch
):
    argv = command("locality", "x", "--subset", 1, seeds=1, budget=10)
    with monkeypatch.context() as patch:
        patch.setattr("miniconvit.pictures.find_spec", lambda name: None)
        status, _, err = program(*argv)
    assert status == 2
    assert re.fullmatch(r"Error: pictures need matplotlib[^\n]*pip install matplotlib\n", err)
    assert (tmp_path / "x/table.md").exists() and not (tmp_path / "x/locality.png").exists()
    pytest.importorskip("matplotlib")
    assert program(*argv)[0] == 0
    assert (tmp_path / "x/locality.png").exists()


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


def test_measuring_times_the_second_of_two_epochs(small, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(training, "load_dataset", lambda *_: without_test())
    monkeypatch.setitem(VARIANTS, "convit_micro32", SMALL)
    row = rows_of(complete("escape", {"data": "shapes"}))[0]
    settings = replace(row.settings, batch_size=16)
    found = running.measure(settings, 100, data_dir=None, threads=1, device="cpu")
    assert set(found) == {"images_per_second", "validation_seconds", "start_seconds"}
    assert all(value > 0 for value in found.values())


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
    "no plan's content": (["ablation", "--plan", "list.json"], "list.json is damaged"),
    "a full folder": (["ablation", "--out", "."], "holds no plan"),
    "too few minutes": (["ablation", "--data", "shapes", "--budget", "1"], "do not fit"),
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
    (tmp_path / "other.json").write_text(json.dumps(values | {"seeds": [4]}))
    for given, words in (
        ([*argv, "--budget", 39], "--budget 4.0, not 39.0"),
        (["escape", "--resume", "--out", "x", "--seeds", 2], "--seeds 1, not 2"),
        (["escape", "--out", "x"], "--data shapes, not cifar10"),
        (["ablation", "--resume", "--out", "x"], "a plan of escape, not of ablation"),
        (["escape", "--plan", "other.json", "--out", "x"], "holds another plan"),
        (["ablation", "--plan", "other.json"], "a plan of escape"),
        (["escape", "--plan", "other.json", "--seeds", 2], "leave out --seeds"),
    ):
        status, _, err = program(*given)
        assert status == 2 and words in err
        assert re.fullmatch(r"Error: [^\n]+\n", err)
