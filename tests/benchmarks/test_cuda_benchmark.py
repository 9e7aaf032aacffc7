"""benchmarks/cuda.py on the stand-in: that its checks can fail, and that it picks up its work."""

import importlib.util
import json
import re
from pathlib import Path

import fakecupy
import numpy as np
import pytest
from click.testing import CliRunner

from miniconvit.gradcheck.cases import CASES

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
    monkeypatch.setattr(script, "SHAPES", {"micro": ("micro32", 2, 4, True)})
    for name, value in {"SECONDS": 0.0, "MIN_STEPS": 2, "WARM_UP": 1}.items():
        monkeypatch.setattr(script, name, value)
    return script


def start(script, folder, *options):
    result = CliRunner().invoke(script.main, [str(folder), *map(str, options)])
    return result.exit_code, result.output


def results(folder):
    return json.loads((folder / "table.json").read_text())["results"]


def test_the_plan_asks_all_questions(script):
    names = [name for name, _, _ in script.plan()]
    checks = [name for name in names if name.startswith("check ")]
    assert names[: len(checks)] == checks and len(checks) == 2 * (len(CASES) + 2)
    rows = names[len(checks) :]
    assert rows[0] == "Ti 32x32 / 4: miniconvit fp32"
    for shape in ("Ti 32x32 / 4", "Ti 224x224 / 16", "S 224x224 / 16", "B 224x224 / 16"):
        for precision in ("fp32", "TF32", "bf16"):
            assert f"{shape}: timm eager {precision}" in rows
            assert (f"{shape}: timm compile {precision}" in rows) == shape.startswith("Ti")
        assert f"{shape}: miniconvit's ViT twin fp32" in rows


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
    if function == "exp":
        assert not script.passed(script.check_model("float32", cupy))
        assert not script.passed(script.check_losses("float64", cupy))


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


def test_it_stops_in_time_and_picks_up(small, tmp_path, monkeypatch):
    monkeypatch.setattr(small, "CASES", {"gelu": CASES["gelu"]})
    now = [0.0]
    monkeypatch.setattr(small.time, "monotonic", lambda: now[0])
    attempt = small.attempt

    def half_a_minute(function, xp):
        now[0] += 30.0
        return attempt(function, xp)

    monkeypatch.setattr(small, "attempt", half_a_minute)
    done = []
    while len(done) < 20:
        began = now[0]
        status, output = start(small, tmp_path, "--minutes", 3)
        assert status == 0 and now[0] - began <= 180
        done.append(len(results(tmp_path)))
        if "all is done" in output:
            break
        assert "items are left: start the script again" in output
    assert len(done) > 2 and done == sorted(set(done))
    assert done[-1] == len(list(small.plan()))


def test_what_never_finishes_is_left_out_at_the_third_time(small, tmp_path, monkeypatch):
    monkeypatch.setattr(small, "CASES", {"gelu": CASES["gelu"]})

    def killed(name, batch, xp):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(small, "measure_ours", killed)
        for _ in range(2):
            start(small, tmp_path)
    status, output = start(small, tmp_path)
    assert status == 0 and "all is done" in output
    found = results(tmp_path)
    assert found["micro: miniconvit fp32"] == {"failed": "was begun twice and never finished"}
    assert "step_ms_median" in found["micro: miniconvit's ViT twin fp32"]


def test_nothing_is_measured_where_a_check_fails(small, tmp_path, monkeypatch):
    cupy = small.resolve_device("cuda")[0]
    monkeypatch.setattr(cupy, "tanh", fakecupy.elementwise(lambda x: np.tanh(x) * 1.001))
    monkeypatch.setattr(small, "CASES", {"gpsa": CASES["gpsa"], "gelu": CASES["gelu"]})
    status, output = start(small, tmp_path)
    assert status == 1 and "a check failed" in output
    found = results(tmp_path)
    assert not small.passed(found["check gpsa float32"])
    assert small.passed(found["check gelu float32"])
    assert all(name.startswith("check ") for name in found)
    assert "**WRONG**" in (tmp_path / "table.md").read_text()


def test_without_a_gpu_it_is_one_sentence(script, tmp_path, monkeypatch):
    monkeypatch.setattr("miniconvit.engine.cuda._driver_version", lambda: 0)
    status, output = start(script, tmp_path / "new")
    assert status == 1
    assert re.fullmatch(r"Error: --device cuda cannot be used: no NVIDIA driver[^\n]+\n", output)
    assert not (tmp_path / "new").exists()
