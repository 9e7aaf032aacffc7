"""The folder of a run that somebody damaged: a sentence names the file, whoever reads it."""

import json
import os
import random
import re
import shutil
import signal
from collections import Counter

import pytest
from small_run import FLAGS, small_dataset, stop_after

from miniconvit import UserError, cli
from miniconvit.training.run_folder import CONFIG, LOG, RunFolder

ROWS = [
    "[]",
    "1",
    "{}",
    "NaN",
    "[" * 100_000,
    "@drop val_loss",
    "@train_loss null",
    "@train_loss true",
    '@lr "0.1"',
    "@seconds 1e999",
    "@val_top1 1.5",
    "@epoch 7",
    "@epoch 2.0",
    "@step {}",
    "@gates 3",
    "@gates [3]",
    '@nonlocality [["a"]]',
    "@strengths [[[1]]]",
    "@drop centre_norms",
    "@colour 1",
]
"""What stands in the place of the second row, or of one of its values."""


def train(folder, status):
    """A run of three epochs, which ends with this status."""
    argv = ["train", *FLAGS, "--epochs", "3", "--device", "cpu", "--out", str(folder)]
    with pytest.raises(SystemExit) as end:
        cli.main([*argv, "--workers", "1", "--quiet"])
    assert end.value.code == status
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a whole run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("miniconvit.training.run.load_dataset", small_dataset)
        return train(tmp_path_factory.mktemp("run") / "run", 0)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of the same run, stopped in its third epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("miniconvit.training.run.load_dataset", small_dataset)
        stop_after(patch, 15)
        return train(tmp_path_factory.mktemp("stopped") / "run", 128 + signal.SIGINT)


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("miniconvit.training.run.load_dataset", small_dataset)
    monkeypatch.setattr("miniconvit.cli.eval.load_dataset", small_dataset)
    return shutil.copytree(trained, tmp_path / "run")


def damaged(line, what):
    """The line with another row, or a row with another value, in its place, and no checksum."""
    if not what.startswith("@"):
        return what
    name, _, value = what[1:].partition(" ")
    row = json.loads(line)
    del row["crc32"]
    if name == "drop":
        del row[value]
        return json.dumps(row)
    row[name] = "@"
    return json.dumps(row).replace('"@"', value)


def assert_sentence(answer, words):
    status, _, err = answer
    assert status == 2 and err.startswith("Error: ") and err.count("\n") == 1 and words in err, err


@pytest.mark.parametrize("what", ROWS, ids=lambda what: what[:30])
def test_a_row_that_is_no_row(run, program, what):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    assert len(RunFolder(run).rows(3)) == len(RunFolder(run).finished_epochs()) == 3
    path.write_text("\n".join([lines[0], damaged(lines[1], what), lines[2], ""]))
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: line 2|metrics\.jsonl is dam"):
        RunFolder(run).finished_epochs()
    assert len(RunFolder(run).rows(1)) == 1
    assert_sentence(program("train", "--resume", "--out", run), "metrics.jsonl is damaged: 3 whole")
    assert_sentence(program("inspect", run, "--json"), "metrics.jsonl is damaged")


def test_readings_of_another_model_are_no_history(run, program):
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["gates"] = rows[1]["gates"][:-1]
    del rows[1]["crc32"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_sentence(program("inspect", run, "--json"), "are not those of this model")


@pytest.mark.parametrize(
    "text", ["", "[]", "{" * 5000, '{"settings": []}', '{"settings": {"lr": {}}}', "{}", "\ufeff{}"]
)
def test_a_config_that_is_none(run, program, text):
    (run / CONFIG).write_text(text)
    for argv in (["train", "--resume", "--out", run], ["eval", run]):
        assert_sentence(program(*argv), "config.json")


@pytest.mark.parametrize("name", ["metrics.jsonl", "last.safetensors", "best.safetensors", LOG])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file(run, program, name, make):
    (run / name).unlink()
    make(run / name)
    assert_sentence(program("train", "--resume", "--out", run), f"{name} is no file")
    if name == "best.safetensors":
        assert_sentence(program("eval", run), f"{name} is no file")
    if name == "metrics.jsonl":
        assert_sentence(
            program("inspect", run, "--json"), "metrics.jsonl is damaged: it is no file"
        )


# Any byte of a stopped run: it is resumed to the same bits, or not at all


FILES = (CONFIG, LOG, "metrics.jsonl", "last.safetensors", "best.safetensors")


def flip(content, where, rng):
    return content[:where] + bytes([content[where] ^ 1 << rng.randrange(8)]) + content[where + 1 :]


def digit(content, where, rng):
    """Another digit in the place of one, so that the text stays a text."""
    digits = [place.start() for place in re.finditer(rb"\d", content)]
    where = rng.choice(digits)
    return content[:where] + str(rng.randrange(10)).encode() + content[where + 1 :]


def overwrite(content, where, rng):
    return content[:where] + rng.randbytes(9) + content[where + 9 :]


def zero(content, where, _):
    """As a crash may leave a file: its length is right, but its end was not written."""
    return content[:where] + bytes(len(content) - where)


def cut(content, where, _):
    return content[:where]


DAMAGE = (flip, digit, overwrite, zero, cut)


def outcome(folder):
    """What a run ends with: both checkpoints' bytes, and its rows without their timings."""
    rows = RunFolder(folder).rows(3)
    for row in rows:
        del row["images_per_second"], row["seconds"]
    return [(folder / name).read_bytes() for name in ("last.safetensors", "best.safetensors")], rows


@pytest.mark.parametrize(("seed", "count"), [(1, 25), pytest.param(2, 400, marks=pytest.mark.full)])
def test_damaged_runs_are_refused_or_end_with_the_same_bits(
    seed, count, trained, stopped, tmp_path, program, monkeypatch
):
    monkeypatch.setattr("miniconvit.training.run.load_dataset", small_dataset)
    expected, found = outcome(trained), Counter()
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        name, damage = FILES[i % len(FILES)], rng.choice(DAMAGE)
        folder = shutil.copytree(stopped, tmp_path / str(i))
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(damage(content, rng.randrange(len(content)), rng))
        answer = program("train", "--resume", "--out", folder, "--workers", 1, "--quiet")
        if answer[0] == 0:
            assert outcome(folder) == expected, (i, name, damage.__name__)
        else:
            assert_sentence(answer, "")
        found[name, "refused" if answer[0] else "same bits"] += 1
        shutil.rmtree(folder)
    print(sorted(found.items()))
    assert found[LOG, "same bits"] == count / len(FILES)
    assert found["last.safetensors", "refused"] + found["best.safetensors", "refused"] > count / 3


def test_a_lost_best_checkpoint_is_said(stopped, tmp_path, program, monkeypatch):
    monkeypatch.setattr("miniconvit.training.run.load_dataset", small_dataset)
    folder = shutil.copytree(stopped, tmp_path / "run")
    (folder / "best.safetensors").unlink()
    answer = program("train", "--resume", "--out", folder)
    assert_sentence(answer, "best.safetensors is missing or damaged: put it back from a copy")
    assert "--init-from" in answer[2]


def test_metrics_of_an_older_version_are_resumed(stopped, trained, tmp_path, program, monkeypatch):
    """Their lines have no checksum."""
    monkeypatch.setattr("miniconvit.training.run.load_dataset", small_dataset)
    folder = shutil.copytree(stopped, tmp_path / "run")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(re.sub(r', "crc32": \d+', "", text))
    assert program("train", "--resume", "--out", folder, "--quiet")[0] == 0
    assert outcome(folder) == outcome(trained)
