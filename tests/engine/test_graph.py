"""A whole training step as one graph: the same bits, one launch, and none where it cannot be."""

from dataclasses import replace

import fakecuda
import fakecupy
import numpy as np
import pytest

import miniconvit as mc
from miniconvit.arrays import to_cpu, to_device
from miniconvit.engine.gpu import DeviceEngine
from miniconvit.engine.kernels.cuda import Graph
from miniconvit.engine.objective import Classification

pytestmark = pytest.mark.skipif(not fakecuda.COMPILER, reason=fakecuda.REASON)
CONFIG = mc.ConViTConfig((4, 6), 2, 3, 7, 24, 3, 4, 2.0, local_up_to_layer=2, drop_path_rate=0.5)
STEPS = 7


def training(xp, config=CONFIG, records=True, batches=(9,) * STEPS, soft=False, kind=mc.AdamW):
    """(numbers of each step, state at the end, launches of each step, the engine) of a training
    with everything in it: drop path, clipping, an average, and gates that stay."""
    rng = np.random.default_rng(1)
    params = mc.init_params(config)
    average = {name: p + 0.1 for name, p in params.items()}
    params, average = to_device((params, average), xp)
    optimizer, numbers, launches = kind(params, weight_decay=0.2), [], []
    trained = [name for name in params if not name.endswith("gating_param")]
    engine = DeviceEngine(Classification(config, 0.1), xp)
    engine.records = records
    engine.hold(params, optimizer, average, trained, 0.7, 0.9)
    for number, n in enumerate(batches):
        images = rng.standard_normal((n, 3, *config.image), dtype="float32")
        targets = rng.integers(7, size=n)
        if soft:
            targets = np.eye(7, dtype="float32")[targets]
        batch = to_device((images, targets), xp)
        before = fakecupy.STATE.launches
        numbers.append(engine.step(lambda *_, b=batch: b, n, 1e-3 * (number + 1), 5, number))
        launches.append(fakecupy.STATE.launches - before)
    state = {"params": params, "average": average, "exp_avg": optimizer.exp_avg}
    state |= {"exp_avg_sq": optimizer.exp_avg_sq, "numbers": numbers}
    return to_cpu(state), launches, engine


def assert_same_bits(found, true):
    for kind, tensors in true.items():
        named = tensors.items() if isinstance(tensors, dict) else enumerate(tensors)
        for name, value in named:
            assert np.array_equal(found[kind][name], value), (kind, name)


@pytest.mark.parametrize("kind", [mc.AdamW, mc.Muon])
@pytest.mark.parametrize("soft", [False, True])
def test_a_graph_gives_the_same_bits_by_one_launch(cupy, soft, kind):
    true, launches, engine = training(cupy, records=False, soft=soft, kind=kind)
    assert engine.graph_problem is None and min(launches) > 50
    assert fakecupy.STATE.graphs == 0
    found, launches, engine = training(cupy, soft=soft, kind=kind)
    assert engine.graph_problem is None
    assert_same_bits(found, true)
    assert fakecupy.STATE.graphs == STEPS - 1  # once to be compared
    # beside the graph: the step's number, its rates, images, targets, and the numbers to keep
    assert set(launches[2:]) == {1 + 5}


@pytest.mark.parametrize("kind, most", [(mc.AdamW, 110), (mc.Muon, 145)])
def test_a_step_without_a_graph_is_what_its_three_calls_are(cupy, kind, most):
    """step() beside loss_and_grads, clip, update and average."""
    true, _, _ = training(cupy, records=False, kind=kind)

    def step(self, load, n, lr, seed, step):
        params, optimizer, names, max_norm, decay = self._training
        loss, correct, grads = self.loss_and_grads(load, n, params, seed, step)
        grads = {name: grads[name] for name in names}
        norm = self.clip(grads, max_norm)
        self.update(optimizer, {name: params[name] for name in names}, grads, lr)
        self.average(self._buffers._held["average"][1], params, decay)
        return cupy.stack([loss, correct.astype("float32"), norm])

    before = fakecupy.STATE.launches
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceEngine, "step", step)
        found, _, _ = training(cupy, records=False, kind=kind)
    assert_same_bits(found, true)
    assert fakecupy.STATE.launches - before < STEPS * most  # by flat kernels, too


def test_batches_of_other_sizes_have_their_own_graphs(cupy):
    batches = (9, 9, 9, 4, 4, 4, 9)
    true, _, _ = training(cupy, records=False, batches=batches)
    found, launches, _ = training(cupy, batches=batches)
    assert_same_bits(found, true)
    assert launches[2] == launches[5] == 6 and launches[3] > 50


def failing(error):
    def function(*args, **kwargs):
        raise error

    return function


TROUBLES = {
    "a capture that is refused": (
        "begin_capture", failing(NotImplementedError("calling cuBLAS is unsupported")), "cuBLAS"),
    "memory that does not suffice": (
        "begin_capture", failing(MemoryError("out of memory")), "out of memory"),
    "a capture that fails at its end": (
        "end_capture", failing(RuntimeError("cudaErrorStreamCaptureInvalidated")), "Invalidated"),
}  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLES)
def test_where_no_graph_can_be_recorded_steps_go_on_without(cupy, monkeypatch, trouble):
    true, _, _ = training(cupy, records=False)
    method, fails, reason = TROUBLES[trouble]
    whole = getattr(fakecupy.Stream, method)

    def failed(self):
        if method == "end_capture":
            whole(self)
        fails()

    monkeypatch.setattr(fakecupy.Stream, method, failed)
    found, launches, engine = training(cupy)
    fakecupy.reset()
    assert_same_bits(found, true)
    assert reason in engine.graph_problem and launches[-1] > 50


def test_a_graph_with_other_bits_is_not_used(cupy, monkeypatch):
    """As where it were launched into memory that another has been given."""
    true, _, _ = training(cupy, records=False)
    launch = Graph.launch

    def wrong(self, stream):
        launch(self, stream)
        self.results += 1e-6

    monkeypatch.setattr(Graph, "launch", wrong)
    found, _, engine = training(cupy)
    assert_same_bits(found, true)
    assert engine.graph_problem == "a graph of the step gives other bits"


def test_psa_takes_cupys_products_which_cannot_be_recorded(cupy):
    config = replace(CONFIG, attention="psa")
    true, _, _ = training(cupy, config, records=False)
    found, _, engine = training(cupy, config)
    assert_same_bits(found, true)
    assert engine.graph_problem


def test_a_step_that_does_not_fit_is_answered_as_without_a_graph(cupy):
    params = to_device(mc.init_params(CONFIG), cupy)
    images, labels = cupy.zeros((64, 3, 4, 6), "float32"), cupy.zeros((64,), "int64")
    engine = DeviceEngine(Classification(CONFIG), cupy)
    engine.hold(params, mc.AdamW(params))
    engine.step(lambda a, b: (images[a:b], labels[a:b]), 1, 1e-3, 0, 0)
    with (
        fakecupy.memory_limit(500_000),
        pytest.raises(mc.UserError, match=r"a step of 64 images .* add --batch-size \d+, which"),
    ):
        engine.step(lambda a, b: (images[a:b], labels[a:b]), 64, 1e-3, 0, 1)


def test_what_is_held_next_has_its_own_graph(cupy):
    """With settings that are whole numbers, too."""
    rng, states = np.random.default_rng(1), []
    images = rng.standard_normal((9, 3, *CONFIG.image), dtype="float32")
    batch = to_device((images, rng.integers(7, size=9)), cupy)
    for records in (True, False):
        engine = DeviceEngine(Classification(CONFIG), cupy)
        engine.records = records
        for seed, kind in enumerate((mc.AdamW, mc.Muon)):
            params = to_device(mc.init_params(CONFIG, seed), cupy)
            engine.hold(params, kind(params, weight_decay=1))
            for number in range(4):
                engine.step(lambda *_: batch, 9, 1, 5, number)
        states.append(to_cpu({"params": params}))
        assert engine.graph_problem is None
    assert_same_bits(*states)
    first = mc.init_params(CONFIG, 1)
    assert (states[0]["params"]["head.weight"] != first["head.weight"]).any()
