"""The command line: what it prints, and one sentence with exit status 2 for every mistake."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_run import FLAGS, small_dataset

import miniconvit
import miniconvit.cli.eval as eval_command
from miniconvit import cli, convit_forward
from miniconvit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from miniconvit.data import normalize
from miniconvit.training.report import COLUMNS, duration, epoch_line, text_curve
from miniconvit.training.settings import Settings

ROOT = Path(__file__).parents[2]
SHORT = [*FLAGS, "--epochs", "2"]


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    monkeypatch.setattr("miniconvit.training.run.load_dataset", small_dataset)
    monkeypatch.setattr(eval_command, "load_dataset", small_dataset)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder and what training printed."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("miniconvit.training.run.load_dataset", small_dataset)
        patch.setattr(sys, "stdout", io.StringIO())
        with pytest.raises(SystemExit) as end:
            cli.main(["train", *SHORT, "--out", str(folder)])
        assert end.value.code == 0
        return folder, sys.stdout.getvalue()


def real(*argv, **options):
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, **options)


def assert_sentence(status, out, err, *words):
    """Exit status 2, nothing on standard output, one line on standard error with these words."""
    assert (status, out) == (2, "")
    assert re.fullmatch(r"Error: [^\n]+\n", err)
    for word in words:
        assert word in err


def test_train_prints_a_line_per_epoch_and_a_summary(trained):
    folder, out = trained
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = re.findall(r"^ +(\d+) +([\d.]+) .* ([\d.]+) % +\S+e-\d+ ", out, re.MULTILINE)
    assert lines == [
        (str(row["epoch"]), f"{row['train_loss']:.4f}", f"{100 * row['val_top1']:.1f}")
        for row in rows
    ]
    best = max(row["val_top1"] for row in rows)
    assert f"best validation accuracy   {100 * best:.1f} %" in out
    assert f"{folder}/best.safetensors" in out
    assert f"miniconvit eval {folder}" in out


def test_train_draws_a_picture_or_a_curve_of_characters(trained, tmp_path, program, monkeypatch):
    folder, _ = trained
    pytest.importorskip("matplotlib")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("miniconvit.training.report.find_spec", lambda name: None)
    status, out, _ = program("train", *SHORT, "--out", tmp_path / "run")
    assert status == 0
    assert "validation accuracy" in out
    assert "100 % |" in out
    assert not (tmp_path / "run" / "curves.png").exists()


def test_quiet_prints_the_end_alone(tmp_path, program):
    status, out, err = program("train", *SHORT, "--out", tmp_path / "run", "--quiet")
    assert (status, err) == (0, "")
    assert "train loss" not in out
    assert out.strip().startswith("best validation accuracy")


def test_resume_of_a_finished_run_says_so(trained, program):
    folder, _ = trained
    before = (folder / "last.safetensors").read_bytes()
    status, out, _ = program("train", "--resume", "--out", folder)
    assert status == 0
    assert "is finished" in out
    assert (folder / "last.safetensors").read_bytes() == before


def test_eval_of_a_run_is_what_training_reported(trained, program):
    folder, _ = trained
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: row["val_top1"])
    status, out, err = program("eval", folder, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found.pop("checkpoint") == f"{folder}/best.safetensors"
    assert found.pop("computed") == "on the CPU"
    assert sum(row["right"] for row in found.pop("by_class")) == round(30 * best["val_top1"])
    assert sum(row["images"] for row in found.pop("confusions")) == round(
        30 - 30 * best["val_top1"]
    )
    assert found == {
        "data": "shapes",
        "split": "val",
        "images": 30,
        "loss": best["val_loss"],
        "top1": best["val_top1"],
        "top5": 1.0,
    }
    status, out, _ = program("eval", folder / "last.safetensors", "--split", "train")
    assert status == 0
    assert re.search(r"split +train\nimages +100\nloss +\d", out)


def test_eval_of_what_does_not_fit(trained, tmp_path, program):
    folder, _ = trained
    model = load_checkpoint(folder / "best.safetensors")
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, model.params, model.config, classes=["a", "b", "c"], data="shapes")
    assert_sentence(*program("eval", other), "other classes", str(other))
    save_checkpoint(other, model.params, model.config)
    assert_sentence(*program("eval", other), "add --data")
    assert program("eval", other, "--data", "shapes")[0] == 0


def test_eval_downloads_only_what_is_asked_for_by_name(trained, program, monkeypatch):
    asked = []

    def note(name, data_dir, download, **_):
        asked.append((name, data_dir, download))
        return small_dataset()

    monkeypatch.setattr(eval_command, "load_dataset", note)
    assert program("eval", trained[0])[0] == 0
    assert program("eval", trained[0], "--data", "shapes", "--data-dir", "here")[0] == 0
    assert asked == [("shapes", None, False), ("shapes", Path("here"), True)]


def test_resume_and_eval_look_where_the_data_lay(tmp_path, program, monkeypatch):
    """A relative --data-dir is remembered as what it meant; the line printed at the end works."""
    asked = []

    def note(name, data_dir, download, *_args, **_options):
        asked.append((data_dir, download))
        return small_dataset()

    monkeypatch.setattr("miniconvit.training.run.load_dataset", note)
    monkeypatch.setattr(eval_command, "load_dataset", note)
    monkeypatch.chdir(tmp_path)
    run, data, elsewhere = tmp_path / "a run", tmp_path / "the data", tmp_path / "elsewhere"
    _, out, _ = program("train", *SHORT, "--out", "a run", "--data-dir", "the data")
    hint = shlex.split(re.search(r"test it: miniconvit (.*)", out)[1])
    assert hint == ["eval", "a run", "--split", "test", "--data-dir", "the data"]
    assert program(*hint)[0] == 0
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert program("train", "--resume", "--out", run)[0] == 0
    assert program("train", "--resume", "--out", run, "--data-dir", "moved")[0] == 0
    assert program("eval", run)[0] == 0
    assert program("eval", run, "--data-dir", "moved")[0] == 0
    given, moved = Path("the data"), Path("moved")
    assert asked == [(given, True), (given, False), *[(data, False), (moved, False)] * 2]
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"data_dir": 5}))
    assert_sentence(*program("eval", run), "config.json", "data_dir")
    assert_sentence(*program("train", "--resume", "--out", run), "config.json", "data_dir")
    (run / "config.json").write_text("[1]")
    assert_sentence(*program("eval", run), "config.json")


def test_a_float64_checkpoint(trained, tmp_path, program):
    """All of it is computed in float64: the answers agree with the reference to its rounding."""
    write_images(tmp_path)
    model, wide = load_checkpoint(trained[0] / "best.safetensors"), tmp_path / "wide.safetensors"
    params = {name: value.astype(np.float64) for name, value in model.params.items()}
    about = {"mean": model.mean, "std": model.std, "classes": model.classes, "data": "shapes"}
    save_checkpoint(wide, params, model.config, **about)

    def reference(images):
        images = normalize(images, model.mean, model.std, "float64")
        logits, _ = convit_forward(images, params, model.config)
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    val = small_dataset().val
    loss = -np.log(reference(val.images)[np.arange(30), val.labels]).mean()
    status, out, _ = program("eval", wide, "--device", "cpu", "--json")
    assert status == 0
    assert json.loads(out)["loss"] == pytest.approx(loss, rel=1e-12)
    answer = program("predict", wide, tmp_path / "rgb.png", "--device", "cpu", "--json")
    assert answer[0] == 0
    top = json.loads(answer[1])["images"][0]["top"]
    rgb = np.random.default_rng(4).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    p = np.sort(reference(rgb.transpose(2, 0, 1)[None])[0])[::-1]
    np.testing.assert_allclose([entry["probability"] for entry in top], p, rtol=1e-12)


@pytest.mark.filterwarnings("error")
def test_answers_that_are_not_finite_are_a_sentence(trained, tmp_path, program):
    """Finite parameters, and normalisations, that overflow on the way."""
    write_images(tmp_path)
    model, other = load_checkpoint(trained[0] / "best.safetensors"), tmp_path / "o.safetensors"
    huge = {name: value * np.float32(1e30) for name, value in model.params.items()}
    about = {"mean": model.mean, "classes": model.classes, "data": "shapes"}
    for params, std in ((huge, model.std), (model.params, [1e-60] * 3)):
        save_checkpoint(other, params, model.config, std=std, **about)
        assert_sentence(*program("eval", other, "--json"), str(other), "finite")
        answer = program("predict", other, tmp_path / "rgb.png", "--json")
        assert_sentence(*answer, str(other), "finite")


def write_images(folder):
    """Image files of many kinds, each with the (height, width, 3) pixels that it shows."""
    Image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(4)
    pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    grey = pixels[:, :, 0]
    grey_rgb = np.stack([grey] * 3, axis=2)
    alpha = np.where(np.arange(64).reshape(8, 8) % 3 == 0, 0, 255).astype(np.uint8)
    shown = np.where(alpha[:, :, None] == 0, 255, pixels)
    files = {}

    def write(name, array, expected, mode=None, **options):
        image = Image.fromarray(array)
        image = image.convert(mode) if mode else image
        image.save(folder / name, **options)
        files[name] = expected

    write("rgb.png", pixels, pixels)
    write("grey.png", grey, grey_rgb)
    write("alpha.png", np.dstack([pixels, alpha]), shown)
    write("black.png", np.where(grey > 99, 255, 0).astype(np.uint8),
          np.where(grey_rgb > 99, 255, 0), mode="1")  # fmt: skip
    write("deep.png", grey.astype(np.uint16) * 256 + 77, grey_rgb)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera's top is at the right: to be shown turned clockwise
    write("turned.png", np.rot90(pixels), pixels, exif=turned)
    wide = np.zeros((8, 12, 3), np.uint8)
    wide[:, 2:10] = pixels
    write("wide.png", wide, pixels)
    return files


def test_predict_reads_every_kind_of_image(trained, tmp_path, program):
    folder, _ = trained
    files = write_images(tmp_path)
    status, out, err = program("predict", folder, *(tmp_path / name for name in files), "--json")
    assert (status, err) == (0, "")
    model = load_checkpoint(folder / "best.safetensors")
    answers = json.loads(out)["images"]
    assert [answer["file"] for answer in answers] == [str(tmp_path / name) for name in files]
    for pixels, answer in zip(files.values(), answers, strict=True):
        image = pixels.astype(np.uint8).transpose(2, 0, 1)[None]
        logits, _ = convit_forward(
            normalize(image, model.mean, model.std), model.params, model.config
        )
        p = np.exp(logits[0]) / np.exp(logits[0]).sum()
        order = np.argsort(p)[::-1]
        assert [entry["index"] for entry in answer["top"]] == list(order), answer["file"]
        assert [entry["class"] for entry in answer["top"]] == [model.classes[i] for i in order]
        np.testing.assert_allclose(
            [entry["probability"] for entry in answer["top"]], p[order], rtol=1e-4
        )


def test_predict_of_one_logit_is_refused(trained, tmp_path, program):
    model, one = load_checkpoint(trained[0] / "best.safetensors"), tmp_path / "one.safetensors"
    write_images(tmp_path)
    params = model.params | {k: model.params[k][:1] for k in ("head.weight", "head.bias")}
    config = replace(model.config, num_classes=1)
    save_checkpoint(one, params, config, mean=model.mean, std=model.std)
    answer = program("predict", one, tmp_path / "rgb.png", "--json")
    assert_sentence(*answer, str(one), "softmax over one class says nothing")


def test_predict_prints_classes(trained, tmp_path, program):
    write_images(tmp_path)
    status, out, _ = program("predict", trained[0], tmp_path / "rgb.png")
    assert status == 0
    assert out.startswith(f"{tmp_path}/rgb.png\n")
    shown = re.findall(r"^ +[\d.]+ %   (\w+)$", out, re.MULTILINE)
    assert sorted(shown) == ["bluish", "greenish", "reddish"]


def test_predict_of_what_is_no_image(trained, tmp_path, program, monkeypatch):
    folder, _ = trained
    write_images(tmp_path)
    text = tmp_path / "text.png"
    text.write_text("not an image")

    def assert_named(words):
        status, out, err = program("predict", folder, text)
        assert (status, out) == (1, "")
        assert re.fullmatch(rf"Error: [^\n]*{words}[^\n]+\n", err)

    assert_named("text.png is not an image")
    whole = (tmp_path / "rgb.png").read_bytes()
    text.write_bytes(whole[: len(whole) // 2])
    assert_named("text.png cannot be read")
    text = tmp_path / "none.png"
    assert_named("there is no image")
    text = tmp_path / "empty"
    text.mkdir()
    assert_named("empty holds no image")
    monkeypatch.setattr("miniconvit.data.images.find_spec", lambda name: None)
    assert_sentence(*program("predict", folder, text), "pip install Pillow")


def test_doctor(program):
    status, out, err = program("doctor", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["numpy"] == np.__version__
    assert 1 <= found["threads"] <= len(os.sched_getaffinity(0))
    assert found["matmul_ms"] > 0
    assert found["matmul_gflops"] == pytest.approx(2 * 1024**3 / found["matmul_ms"] / 1e6, 0.05)
    assert {"kernels", "cpu_bf16"} <= found.keys()
    assert found["verdict"].startswith(("ready", "usable"))
    status, out, _ = program("doctor")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == list(found)


def test_help_version_and_nothing(program):
    assert program("--version") == (0, f"miniconvit {miniconvit.__version__}\n", "")
    for argv in ((), ("--help",)):
        status, out, err = program(*argv)
        assert (status, err) == (0, "")
        assert re.findall(r"^  (\w+)  +\S", out, re.MULTILINE) == list(cli.COMMANDS)


def test_every_flag_of_train_is_explained(program):
    status, out, _ = program("train", "--help")
    assert status == 0
    for name in Settings.__dataclass_fields__:
        assert f"--{name.replace('_', '-')} " in out


MISTAKES = {
    "unknown command": (["trian"], "trian"),
    "unknown flag": (["train", "--learning-rate", 1], "--learning-rate"),
    "value missing": (["train", "--lr"], "--lr"),
    "not a number": (["train", "--lr", "fast"], "fast"),
    "out of range": (["train", "--lr", -1], "--lr must be a positive number"),
    "no images in a batch": (["bench", "--batch-size", 0], "--batch-size must be an integer"),
    "no workers": (["train", "--workers", 0], "--workers"),
    "not a size": (["train", "--img-size", "8by8"], "8by8"),
    "unknown data": (["train", "--data", "mnist"], "mnist"),
    "unknown model": (["train", "--model", "resnet"], "resnet"),
    "unknown recipe": (["train", "--recipe", "risotto"], "risotto"),
    "two lengths": (["train", "--epochs", 1, "--steps", 1], "--epochs or by --steps"),
    "another image size": (["train", "--out", "new"], "--img-size 8x8"),
    "patches that do not fit": (["train", "--img-size", 8, "--patch-size", 3], "3x3"),
    "negative layers": (
        ["train", "--img-size", 8, "--local-up-to-layer", -1],
        "--local-up-to-layer",
    ),
    "no patches": (["train", "--patch-size", 0], "--patch-size"),
    "no checkpoint": (["eval", "none.safetensors"], "there is no checkpoint none.safetensors"),
    "no run": (["eval", "."], "holds no checkpoint"),
    "unknown split": (["eval", ".", "--split", "best"], "best"),
    "no images": (["predict", "none.safetensors"], "IMAGE"),
    "unknown layer": (["gradcheck", "--layer", "lstm"], "lstm"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(tmp_path, program, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    argv, word = MISTAKES[mistake]
    assert_sentence(*program(*argv), word)
    assert os.listdir(tmp_path) == []


def test_a_different_setting_is_named(trained, program):
    folder, _ = trained
    answer = program("train", "--resume", "--out", folder, "--seed", 4)
    assert_sentence(*answer, "began with --seed 3 and cannot go on with --seed 4")
    answer = program("train", "--resume", "--out", folder, "--steps", 4)
    assert_sentence(*answer, "began without --steps")
    assert program("train", "--resume", "--out", folder, "--seed", 3, "--workers", 1)[0] == 0


@pytest.mark.parametrize("length", [("--epochs", 40), ("--steps", 7)])
def test_who_asks_for_more_epochs_is_told_the_way_that_exists(trained, program, length):
    folder, _ = trained
    answer = program("train", "--resume", "--out", folder, *length)
    assert_sentence(*answer, f"--init-from {folder} and another --out")


def test_resume_where_nothing_is_saved_says_so_and_begins(tmp_path, program):
    folder = tmp_path / "new"
    status, out, _ = program("train", *SHORT, "--resume", "--out", folder)
    assert status == 0
    note = f"nothing is saved in {folder} yet: the run begins at step 1"
    assert note in out.splitlines() and note in (folder / "log.txt").read_text()
    assert note not in program("train", "--resume", "--out", folder)[1]


def test_divergence_exits_with_1(tmp_path, program):
    status, _, err = program("train", *SHORT, "--lr", 1e37, "--out", tmp_path / "run")
    assert status == 1
    assert re.fullmatch(r"Error: stopped at step \d+ \(epoch 1\): the loss is [^\n]+\n", err)


def test_real_processes():
    """The launcher, exit statuses and streams as a shell sees them."""
    launcher = [sys.executable, ROOT / "cli.py"]
    version = real(*launcher, "--version")
    assert (version.returncode, version.stdout) == (0, f"miniconvit {miniconvit.__version__}\n")
    wrong = real(*launcher, "train", "--lr", "fast")
    assert_sentence(wrong.returncode, wrong.stdout, wrong.stderr, "python cli.py train --help")
    unread = subprocess.Popen([*launcher, "train", "--lr", "fast"], stderr=subprocess.PIPE)
    unread.stderr.close()
    assert unread.wait(timeout=60) == 2
    with open("/dev/full", "w") as full:
        unwritable = subprocess.run(
            [*launcher, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert_sentence(unwritable.returncode, "", unwritable.stderr, "No space left on device")


def test_a_file_size_limit_is_a_sentence(tmp_path):
    """The system refuses a write in the middle of the first save of a real process."""
    resource = pytest.importorskip("resource")
    answer = real(
        sys.executable,
        ROOT / "tests" / "small_run.py",
        *["train", *SHORT, "--out", tmp_path / "run", "--quiet"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert_sentence(answer.returncode, answer.stdout, answer.stderr, "File too large")
    assert not list((tmp_path / "run").glob("*safetensors*"))


def truncated_checkpoint(trained, folder):
    content = (trained / "best.safetensors").read_bytes()
    (folder / "half.safetensors").write_bytes(content[: len(content) // 2])
    return ["eval", folder / "half.safetensors"], "half.safetensors is damaged"


def truncated_cifar(trained, folder):
    data = folder / "cifar-10-batches-bin"
    data.mkdir()
    (data / "data_batch_1.bin").write_bytes(bytes(1000))
    argv = ["train", "--data", "cifar10", "--data-dir", folder, "--out", folder / "run"]
    return [*argv, "--no-download"], "data_batch_1.bin is damaged: expected 30,730,000 bytes"


def unwritable_folder(trained, folder):
    if not os.path.isdir("/proc/self"):
        pytest.skip("needs /proc, where not even root may make a folder")
    return ["train", "--out", "/proc/miniconvit/run"], "cannot write /proc/miniconvit/run"


@pytest.mark.parametrize("case", [truncated_checkpoint, truncated_cifar, unwritable_folder])
def test_damage_seen_by_a_real_process(trained, tmp_path, case):
    argv, words = case(trained[0], tmp_path)
    before = sorted(tmp_path.rglob("*"))
    answer = real(sys.executable, ROOT / "cli.py", *argv)
    assert_sentence(answer.returncode, answer.stdout, answer.stderr, words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.full
def test_no_module_called_cli_is_installed(tmp_path):
    built = real(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, ROOT)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"miniconvit"}


@pytest.mark.parametrize("speed, shown", [(1234.5, "1234"), (0.0, "-")])
def test_an_epoch_without_a_timed_step_has_no_speed(speed, shown):
    row = {"epoch": 2, "train_loss": 1.5, "train_top1": 0.5, "val_loss": 1.4, "val_top1": 0.6}
    line = epoch_line(row | {"lr": 1e-3, "images_per_second": speed, "seconds": 3.0})
    assert line[: COLUMNS.index("images/s") + len("images/s")].split()[-1] == shown
    assert len(line) == len(COLUMNS)


def test_text_curve_is_as_high_as_its_values():
    lines = text_curve([0.0, 0.5, 1.0]).splitlines()
    bars = [line.partition("|")[2].ljust(9) for line in lines[1:9]]
    assert [bar[0:3] for bar in bars] == ["   "] * 8
    assert [bar[3:6] for bar in bars] == ["   "] * 4 + ["███"] * 4
    assert [bar[6:9] for bar in bars] == ["███"] * 8
    assert lines[-1].split() == ["epoch", "1", "3"]
    assert text_curve([0.5] * 300, "ascii").isascii()
    late = text_curve([0.0] * 60 + [1.0]).splitlines()  # every second epoch, up to the last
    assert late[1].endswith("|" + " " * 30 + "█")
    assert late[-1].split() == ["epoch", "1", "61"]
    assert text_curve([0.0] * 61 + [1.0]).splitlines()[-1].split() == ["epoch", "2", "62"]
    assert max(len(line) for line in text_curve([0.5] * 300).splitlines()) <= 72


def test_duration():
    assert [duration(s) for s in (4.21, 65, 3600 * 2 + 184)] == ["4.2 s", "1:05 min", "2:03:04 h"]
