"""benchmarks/cuda.py on the stand-in: that its checks can fail, and that it picks up its work."""

import importlib.util
import json
import re
from pathlib import Path

import fakecuda
import fakecupy
import numpy as np
import pytest
from click.testing import CliRunner
from small_run import small_dataset

import miniconvit as mc
from miniconvit.engine.kernels.cuda import Buffers
from miniconvit.engine.kernels.cuda.product import Products
from miniconvit.gradcheck.cases import CASES
from miniconvit.training.settings import make_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
    fakecupy.install(monkeypatch)
    spec = importlib.util.spec_from_file_location("cuda_benchmark", ROOT / "benchmarks/cuda.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CHECKED_MODEL", "convit_micro32")
    yield module
    fakecupy.reset()


@pytest.fixture
def small(script, monkeypatch):
    """The script with one row of a small model and few steps."""
    monkeypatch.setattr(script, "SHAPES", {"micro": ("micro32", 2, 4)})
    monkeypatch.setattr(script, "train_cifar", lambda *args: {"left": False, "epochs": 100})
    for name, value in {"SECONDS": 0.0, "MIN_STEPS": 2, "WARM_UP": 1}.items():
        monkeypatch.setattr(script, name, value)
    return script


@pytest.fixture
def planned(small, monkeypatch):
    """The same, whose checks of whole models are passed unseen: for what the plan does with them.
    They take the stand-in half a minute."""
    right = {"error": 0.0, "tolerance": 1.0, "worst": "nothing"}

    def check_model(dtype, xp, precision="float32"):
        small.check_precision(precision, xp)
        return right

    def check_graph(precision, xp):
        small.check_precision(precision, xp)
        return right

    monkeypatch.setattr(small, "check_losses", lambda dtype, xp: right)
    monkeypatch.setattr(small, "check_model", check_model)
    monkeypatch.setattr(small, "check_graph", check_graph)
    return small


def start(script, folder, *options):
    result = CliRunner().invoke(script.main, [str(folder), *map(str, options)])
    return result.exit_code, result.output


def results(folder):
    return json.loads((folder / "table.json").read_text())["results"]


def test_the_plan_asks_all_questions(script):
    names = [name for name, _, _ in script.plan()]
    checks = [name for name in names if name.startswith("check ")]
    assert names[: len(checks)] == checks and len(checks) == 2 * (len(CASES) + 2) + 2 + 3
    rows = names[len(checks) :]
    assert rows[:2] == ["Ti 32x32 / 4: miniconvit bf16", "Ti 32x32 / 4: timm eager bf16"]
    kinds = ("miniconvit", "miniconvit's ViT twin", "timm eager", "timm compile")
    expected = {
        f"{shape}: {kind} {precision}"
        for shape in ("Ti 32x32 / 4", "Ti 224x224 / 16", "S 224x224 / 16")
        for kind in kinds
        for precision in ("fp32", "TF32", "bf16")
    }
    assert set(rows) == expected | {"CIFAR-10 by cifar10-gpu"} and len(rows) == len(expected) + 1
    before_cifar = rows[: rows.index("CIFAR-10 by cifar10-gpu")]
    assert "S 224x224 / 16: timm compile bf16" in before_cifar


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("layer", CASES)
def test_every_layer_on_the_device_is_the_cpus(script, layer, dtype):
    found = script.check_layer(layer, dtype, script.resolve_device("cuda")[0])
    assert script.passed(found), found


@pytest.mark.parametrize(
    ("function", "wrong", "layers"),
    [
        ("tanh", lambda x: np.tanh(x) * 1.0001, ["gpsa"]),
        ("exp", lambda x: np.exp(x) + 1e-3, ["softmax", "attention", "convit"]),
        ("sqrt", lambda x: np.sqrt(x) * float("nan"), ["layernorm"]),
    ],
)
def test_a_wrong_device_function_is_found(script, monkeypatch, function, wrong, layers):
    cupy = script.resolve_device("cuda")[0]
    monkeypatch.setattr(cupy, function, fakecupy.elementwise(wrong))
    for layer in layers:
        for dtype in ("float64", "float32"):
            assert not script.passed(script.check_layer(layer, dtype, cupy)), layer


@pytest.mark.full
@pytest.mark.skipif(not fakecuda.COMPILER, reason=fakecuda.REASON)
def test_a_wrong_kernel_is_found(script, monkeypatch):
    """A product that is off by 1e-3 is wrong in float32, and within what TF32 and bf16 may be."""
    cupy, whole = script.resolve_device("cuda")[0], Products.__call__

    def off(self, a, b, out=None, alpha=1.0, add=False):
        return whole(self, a, b, out, alpha * 1.001, add)

    assert script.passed(script.check_model("float32", cupy))
    for precision in ("tf32", "bf16"):
        assert script.passed(script.check_model("float32", cupy, precision))
    monkeypatch.setattr(Products, "__call__", off)
    assert not script.passed(script.check_model("float32", cupy))
    assert not script.passed(script.check_losses("float64", cupy))


@pytest.mark.full
@pytest.mark.skipif(not fakecuda.COMPILER, reason=fakecuda.REASON)
def test_a_graph_is_held_to_the_bits(script, monkeypatch):
    cupy = script.resolve_device("cuda")[0]
    for precision in ("float32", "bf16"):
        found = script.check_graph(precision, cupy)
        assert script.passed(found) and found["error"] == 0.0 and "none" not in found["worst"]
    monkeypatch.setattr(Buffers, "note_rates", lambda self, optimizer, lr: None)
    refused = fakecupy.Stream.begin_capture
    with monkeypatch.context() as patch:
        patch.setattr(fakecupy.Stream, "begin_capture", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            script.check_graph("float32", cupy)
    assert fakecupy.Stream.begin_capture is refused


def test_a_precision_that_the_gpu_has_not_is_left_out(planned, tmp_path, monkeypatch):
    monkeypatch.setattr("miniconvit.engine.cuda._compute_capability", lambda: 75)
    monkeypatch.setattr(planned, "CASES", {"gelu": CASES["gelu"]})
    status, output = start(planned, tmp_path)
    assert status == 0, output
    found = results(tmp_path)
    assert "needs a GPU of compute capability" in found["micro: miniconvit bf16"]["skipped"]
    assert "needs a GPU" in found["check the graph tf32"]["skipped"]
    assert "step_ms_median" in found["micro: miniconvit fp32"]


@pytest.mark.full
def test_the_whole_script(small, tmp_path, monkeypatch):
    monkeypatch.setattr(small, "CASES", {name: CASES[name] for name in ("linear", "block")})
    status, output = start(small, tmp_path)
    assert status == 0 and output.endswith("all is done\n"), output
    found = results(tmp_path)
    assert list(found) == [name for name, _, _ in small.plan()]
    losses = found["check ten losses float64"]
    assert losses["tolerance"] == 1e-8 and 0 <= losses["error"] < 1e-9
    ours = found["micro: miniconvit fp32"]
    assert ours["images_per_second"] == pytest.approx(2000 / ours["step_ms_median"])
    assert 1 < ours["peak_memory_mb"] < 100
    assert re.search("not installed|no GPU", found["micro: timm compile bf16"]["skipped"])
    shown = (tmp_path / "table.md").read_text()
    assert "gpu: Stand-in" in shown and "| linear float32 | " in shown
    assert re.search(r"\| micro: miniconvit fp32 \| \d+ \| [\d.]+ \| \d+ \| 1.00 \|", shown)
    assert 'CIFAR-10 by cifar10-gpu: {"left": false' in shown
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert start(small, tmp_path)[0] == 0  # nothing is left to do
    assert (tmp_path / "results.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peers_step_runs_where_it_is_installed(small, precision):
    for peer in ("torch", "timm"):
        pytest.importorskip(peer, reason=f"{peer} is not installed")
    config = small.VARIANTS["convit_micro32"]
    taken = small.time_timm(config, 2, config.num_heads, "eager", precision, "cpu")
    assert len(taken) == 2


def test_it_stops_in_time_and_picks_up(planned, tmp_path, monkeypatch):
    monkeypatch.setattr(planned, "CASES", {"gelu": CASES["gelu"]})
    now = [0.0]
    monkeypatch.setattr(planned.time, "monotonic", lambda: now[0])
    attempt = planned.attempt

    def half_a_minute(function, xp):
        now[0] += 30.0
        return attempt(function, xp)

    monkeypatch.setattr(planned, "attempt", half_a_minute)
    done = []
    while len(done) < 20:
        began = now[0]
        status, output = start(planned, tmp_path, "--minutes", 3)
        assert status == 0 and now[0] - began <= 180
        done.append(len(results(tmp_path)))
        if "all is done" in output:
            break
        assert "items are left: start the script again" in output
    assert len(done) > 2 and done == sorted(set(done))
    assert done[-1] == len(list(planned.plan()))


def test_what_never_finishes_is_left_out_at_the_third_time(planned, tmp_path, monkeypatch):
    monkeypatch.setattr(planned, "CASES", {"gelu": CASES["gelu"]})

    def killed(name, batch, precision, xp):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(planned, "measure_ours", killed)
        for _ in range(2):
            start(planned, tmp_path)
    status, output = start(planned, tmp_path)
    assert status == 0 and "all is done" in output
    found = results(tmp_path)
    assert found["micro: miniconvit bf16"] == {"failed": "was begun twice and never finished"}
    assert "step_ms_median" in found["micro: miniconvit's ViT twin fp32"]


def test_nothing_is_measured_where_a_check_fails(planned, tmp_path, monkeypatch):
    cupy = planned.resolve_device("cuda")[0]
    monkeypatch.setattr(cupy, "tanh", fakecupy.elementwise(lambda x: np.tanh(x) * 1.001))
    monkeypatch.setattr(planned, "CASES", {"gpsa": CASES["gpsa"], "gelu": CASES["gelu"]})
    status, output = start(planned, tmp_path)
    assert status == 1 and "a check failed" in output
    found = results(tmp_path)
    assert not planned.passed(found["check gpsa float32"])
    assert planned.passed(found["check gelu float32"])
    assert all(name.startswith("check ") for name in found)
    assert "**WRONG**" in (tmp_path / "table.md").read_text()


def test_cifar_10_takes_the_rest_of_the_time_and_goes_on(script, tmp_path, monkeypatch):
    monkeypatch.setattr("miniconvit.training.run.load_dataset", small_dataset)
    settings = {"img_size": 8, "epochs": 4, "batch_size": 16, "model": "convit_micro32"}
    settings["precision"] = "float32"
    monkeypatch.setattr(script, "make_settings", lambda recipe: make_settings(recipe, **settings))
    found = script.train_cifar(tmp_path / "cifar10", None, 0.0)
    assert found["left"] and found["epochs"] < 4
    found = script.train_cifar(tmp_path / "cifar10", None, 60.0)
    assert not found["left"] and found["epochs"] == 4 and 0 < found["best_val_top1"] <= 1
    monkeypatch.setattr("miniconvit.training.run.load_dataset", missing)
    assert "no such data" in script.train_cifar(tmp_path / "other", None, 60.0)["failed"]


def missing(*args, **kwargs):
    raise mc.UserError("no such data")


def test_without_a_gpu_it_is_one_sentence(script, tmp_path, monkeypatch):
    monkeypatch.setattr("miniconvit.engine.cuda._driver_version", lambda: 0)
    status, output = start(script, tmp_path / "new")
    assert status == 1
    assert re.fullmatch(r"Error: --device cuda cannot be used: no NVIDIA driver[^\n]+\n", output)
    assert not (tmp_path / "new").exists()
