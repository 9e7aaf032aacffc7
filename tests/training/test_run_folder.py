"""The folder of a run that somebody damaged: a sentence names the file, whoever reads it."""

import json
import os
import shutil

import pytest
from small_run import FLAGS, small_dataset

from miniconvit import UserError
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of three epochs."""
    from miniconvit import cli

    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("miniconvit.training.run.load_dataset", small_dataset)
        argv = ["train", *FLAGS, "--epochs", "3", "--device", "cpu", "--out", str(folder)]
        with pytest.raises(SystemExit) as end:
            cli.main([*argv, "--workers", "1", "--quiet"])
    assert end.value.code == 0
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("miniconvit.training.run.load_dataset", small_dataset)
    monkeypatch.setattr("miniconvit.cli.eval.load_dataset", small_dataset)
    return shutil.copytree(trained, tmp_path / "run")


def damaged(line, what):
    """The line with another row, or a row with another value, in its place."""
    if not what.startswith("@"):
        return what
    name, _, value = what[1:].partition(" ")
    row = json.loads(line)
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
