"""The product with --precision bf16 on a CPU, by its command line: AMX, or what executes it."""

import json
import sys

import amx
import numpy as np
import pytest
from small_run import FLAGS, small_dataset, stop_after
from with_numba import skip_without_numba

import miniconvit as mc
from miniconvit import system
from miniconvit.checkpoints.checkpoint import load_checkpoint
from miniconvit.cli import data, main, predict
from miniconvit.cli import eval as evaluation
from miniconvit.engine import classification, cpu, make_engine
from miniconvit.engine.processes import can_fork
from miniconvit.training import run

skip_without_numba()

TRAIN = ["train", *FLAGS, "--epochs", "3"]
NOT_FOR = "--precision bf16 on a CPU is for ConViT and ViT, and not for --attention psa"
SMALL = mc.ConViTConfig(8, 4, 3, 3, 12, 2, 4, local_up_to_layer=1)


def use_small_data(patch):
    for module in (run, data, evaluation):
        patch.setattr(module, "load_dataset", small_dataset)


def have_tiles(patch):
    """A processor that has AMX, as far as anybody asks."""
    amx.emulate()
    from miniconvit.engine.kernels import tiles

    patch.setattr(tiles, "has_tiles", lambda: True)


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    use_small_data(monkeypatch)


@pytest.fixture
def tiles(monkeypatch):
    have_tiles(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a finished run in bf16, which stays as it is."""
    folder = tmp_path_factory.mktemp("bf16") / "whole"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        use_small_data(patch)
        have_tiles(patch)
        main([*TRAIN, "--precision", "bf16", "--workers", "1", "--out", str(folder)])
    assert end.value.code == 0
    return folder


def outcome(folder):
    """Both checkpoints' bytes and all metrics but the timings."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["images_per_second"], row["seconds"]
    return [(folder / f"{name}.safetensors").read_bytes() for name in ("last", "best")], rows


def assert_sentence(found, *parts):
    """Exit status 2 after one sentence, which holds these parts."""
    status, out, err = found
    assert (status, out) == (2, "") and err.startswith("Error: ") and err.count("\n") == 1
    assert all(part in err for part in parts), err


@pytest.mark.skipif(not can_fork(), reason="workers are processes on Linux alone")
def test_two_workers_give_the_same_bits(whole, program, tiles, tmp_path):
    asked = *TRAIN, "--precision", "bf16", "--workers", 2, "--out", tmp_path / "two"
    status, _, err = program(*asked)
    assert (status, err) == (0, "")
    assert outcome(tmp_path / "two") == outcome(whole)


def test_stopped_and_resumed_is_the_same_run(whole, program, tiles, tmp_path, monkeypatch):
    """And goes on in bf16 by itself, as config.json keeps it, but in no other precision."""
    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        status, _, err = program(*TRAIN, "--precision", "bf16", "--out", parts)
    assert status == 130 and "go on with" in err
    kept = json.loads((parts / "config.json").read_text())
    assert kept["settings"]["precision"] == "bf16"
    for other in ("float32", "tf32"):
        resumed = program("train", "--resume", "--out", parts, "--precision", other)
        assert_sentence(
            resumed, f"began with --precision bf16 and cannot go on with --precision {other}"
        )
    status, _, err = program("train", "--resume", "--out", parts)
    assert (status, err) == (0, "")
    assert outcome(parts) == outcome(whole)


def test_it_is_another_run_than_one_in_float32(whole, program, tmp_path):
    """The losses are close, the bits are not; what is stored is float32."""
    assert program(*TRAIN, "--out", tmp_path / "run")[0] == 0
    found, true = ([row["train_loss"] for row in outcome(f)[1]] for f in (whole, tmp_path / "run"))
    assert found != true and found == pytest.approx(true, rel=0.02)
    params = load_checkpoint(whole / "last.safetensors").params
    assert {p.dtype for p in params.values()} == {np.dtype("float32")}


def test_eval_and_predict(whole, program, tiles, tmp_path, monkeypatch):
    """By bf16 as by float32, up to a few percent of the logits, with other bits."""
    image = pytest.importorskip("PIL.Image")
    logits, picture = {}, tmp_path / "one.png"
    pixels = small_dataset().train.images[:1][0].transpose(1, 2, 0)
    image.fromarray(pixels).save(picture)
    soft = predict.softmax_forward
    for precision in ("float32", "bf16"):
        asked = "--precision", precision

        def noting(x, precision=precision):
            logits.setdefault(precision, []).append(np.array(x))
            return soft(x)

        monkeypatch.setattr(predict, "softmax_forward", noting)
        monkeypatch.setattr(evaluation, "softmax_forward", noting)
        for argv in (("eval", whole), ("predict", whole, picture)):
            status, out, err = program(*argv, *asked, "--json")
            assert (status, err) == (0, "")
            assert json.loads(out)["computed"] == "on the CPU"
    for found, true in zip(logits["bf16"], logits["float32"], strict=True):
        assert 0 < np.linalg.norm(found - true) <= 0.03 * np.linalg.norm(true)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_checkpoint_in_float64_is_refused(program, tiles, tmp_path, workers):
    """By the blocks, in a worker too."""
    pytest.importorskip("PIL")
    file = tmp_path / "double.safetensors"
    about = {"mean": [0.3] * 3, "std": [0.2] * 3, "classes": small_dataset().classes}
    mc.save_checkpoint(file, mc.init_params(SMALL, dtype="float64"), SMALL, data="shapes", **about)
    asked = "eval", file, "--precision", "bf16", "--workers", workers
    assert_sentence(program(*asked), "bf16 is for float32 parameters and images")
    picture = tmp_path / "one.png"
    import PIL.Image

    PIL.Image.fromarray(np.zeros((8, 8, 3), "uint8")).save(picture)
    asked = "predict", file, picture, "--precision", "bf16"
    assert_sentence(program(*asked), "bf16 is for float32 parameters and images")


def test_psa_is_refused(program, tiles, tmp_path):
    """And the folder is free for another run."""
    asked = *TRAIN, "--epochs", 1, "--out", tmp_path / "run"
    found = program(*asked, "--precision", "bf16", "--attention", "psa")
    assert_sentence(found, NOT_FOR, "leave it at float32")
    status, _, err = program(*asked)
    assert (status, err) == (0, "")


@pytest.mark.parametrize("model", ["cmt_micro32", "mobile_micro32"])
def test_other_models_are_refused(program, tiles, model):
    asked = "bench", "--model", model, "--steps", 1, "--batch-size", 2
    assert_sentence(program(*asked, "--precision", "bf16"), NOT_FOR, "leave it at float32")


def commands(folder):
    return [
        [*TRAIN, "--out", folder / "run"],
        ["bench", "--model", "convit_micro32", "--img-size", 8, "--steps", 1, "--batch-size", 2],
        ["eval", folder / "given"],
    ]


def no_tiles(monkeypatch):
    from miniconvit.engine.kernels import tiles

    monkeypatch.setattr(tiles, "has_tiles", lambda: False)


def no_numba(monkeypatch):
    monkeypatch.setattr(system, "version", lambda name: "0.67.1")


def no_folder(monkeypatch):
    monkeypatch.setitem(sys.modules, "miniconvit.engine.kernels", None)


def wrong_products(monkeypatch):
    amx.emulate()
    from miniconvit.engine.kernels import bf16, tiles

    monkeypatch.setattr(tiles, "has_tiles", lambda: True)
    monkeypatch.setattr(bf16, "is_exact", lambda: False)


REASONS = [
    (no_tiles, "--precision bf16 needs AMX"),
    (no_numba, "--precision bf16 on a CPU needs Numba 0.68: pip install"),
    (no_folder, "needs the folder miniconvit/engine/kernels"),
    (wrong_products, "the bf16 products of this CPU are wrong: leave --precision at float32"),
]


@pytest.mark.parametrize("number", range(3), ids=["train", "bench", "eval"])
@pytest.mark.parametrize(("reason", "sentence"), REASONS, ids=lambda v: getattr(v, "__name__", ""))
def test_without_what_it_needs(program, tmp_path, monkeypatch, reason, sentence, number):
    """One sentence and exit status 2, where float32 goes on."""
    params = mc.init_params(SMALL)
    about = {"mean": [0.3] * 3, "std": [0.2] * 3, "classes": small_dataset().classes}
    mc.save_checkpoint(tmp_path / "given", params, SMALL, data="shapes", **about)
    asked = commands(tmp_path)[number]
    reason(monkeypatch)
    assert_sentence(program(*asked, "--precision", "bf16"), sentence)
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_tf32_is_no_precision_of_a_cpu(program, tmp_path):
    for asked in commands(tmp_path)[:2]:
        found = program(*asked, "--precision", "tf32")
        assert_sentence(found, "tf32 is for --device cuda: a CPU takes float32 or bf16")


def test_doctor_says_what_there_is(program, tiles, monkeypatch):
    def told():
        return json.loads(program("doctor", "--json")[1])

    found = told()
    assert found["kernels"] == f"Numba {system.numba_version()}" and found["cpu_bf16"] == "ready"
    for reason, sentence in REASONS[:3]:
        with monkeypatch.context() as patch:
            reason(patch)
            assert sentence in told()["cpu_bf16"]
            assert (told()["kernels"] is None) == (reason is no_numba)


def test_bench_in_bf16(program, tiles, tmp_path):
    status, out, err = program(*commands(tmp_path)[1], "--precision", "bf16", "--json")
    assert (status, err) == (0, "") and json.loads(out)["precision"] == "bf16"


def test_products_are_checked_before_the_first_step(tiles, monkeypatch):
    from miniconvit.engine.kernels import bf16

    calls, is_exact = [], bf16.is_exact
    monkeypatch.setattr(bf16, "is_exact", lambda: calls.append(1) or is_exact())
    with make_engine(classification(SMALL), np, 1, "bf16"):
        assert calls == [1]
    cpu.cpu_blocks()
    assert calls == [1]
