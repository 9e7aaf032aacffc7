"""Workers that are processes: the bits of one thread, and what happens when something fails."""

import fcntl
import mmap
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_run import FLAGS, small_dataset

import miniconvit.engine.processes as processes
import miniconvit.training.loop as training
from miniconvit import UserError, init_params, load_checkpoint
from miniconvit.config import VARIANTS, ConViTConfig
from miniconvit.engine import make_engine
from miniconvit.engine.objective import Classification
from miniconvit.engine.pieces import cut
from miniconvit.engine.processes import LostUpdate, LostWorker, ProcessEngine, can_fork
from miniconvit.engine.threads import ONE_BLAS_THREAD, Engine
from miniconvit.muon import Muon
from miniconvit.optim import AdamW, clip_grad_norm
from miniconvit.training.settings import make_settings

pytestmark = pytest.mark.skipif(not can_fork(), reason="workers are processes on Linux alone")

ROOT = Path(__file__).parents[2]
CONFIG = ConViTConfig((24, 32), (4, 8), 2, 5, 12, 4, 4, 2.0, True, 3, drop_path_rate=0.3)
"""24 patches: 42 images a piece."""
OBJECTIVE = Classification(CONFIG)
N = 300  # eight pieces, and more than there are slots


def drawn(config, dtype="float32", seed=0):
    """Parameters, images and labels, all random."""
    rng = np.random.default_rng(seed)
    params = {
        name: (value + 0.1 * rng.standard_normal(value.shape)).astype(dtype)
        for name, value in init_params(config).items()
    }
    images = rng.standard_normal((N, config.in_chans, *config.image)).astype(dtype)
    return params, images, rng.integers(config.num_classes, size=N)


def assert_same(found, true):
    assert found[:2] == true[:2]
    assert list(found[2]) == list(true[2])
    for name, grad in true[2].items():
        assert found[2][name].dtype == grad.dtype
        np.testing.assert_array_equal(found[2][name], grad, err_msg=name)


def is_gone(pid):
    """Whether a process has ended, waiting for it a while."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # its parent is gone too, and nobody has asked how it ended
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def engine():
    with ProcessEngine(OBJECTIVE, 2) as engine:
        yield engine


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (CONFIG, "float32"),
        (CONFIG, "float64"),
        (replace(CONFIG, attention="psa", qkv_bias=False), "float32"),
        (replace(CONFIG, local_up_to_layer=0, use_pos_embed=False), "float32"),
        (VARIANTS["convit_micro32"], "float32"),
    ],
    ids=["gpsa", "float64", "psa", "vit", "micro"],
)
def test_the_bits_of_one_thread(config, dtype):
    params, images, labels = drawn(config, dtype)
    mixed = np.random.default_rng(1).dirichlet(np.ones(config.num_classes), N).astype(dtype)
    assert len(cut(N, config.num_patches)) >= 4
    objective = Classification(config, 0.1)
    with Engine(objective, 1) as one:
        engines = [ProcessEngine(objective, count) for count in (2, 3)]
        for step, (n, targets) in enumerate([(N, labels), (N, mixed), (N - 7, labels)]):

            def load(start, stop, targets=targets):
                return images[start:stop], targets[start:stop]  # fmt: skip

            true = one.loss_and_grads(load, n, params, 5, step)
            for several in engines:
                assert_same(several.loss_and_grads(load, n, params, 5, step), true)
            true = one.logits(load, n, params)
            for several in engines:
                found = several.logits(lambda start, stop: images[start:stop], n, params)
                assert found.dtype == true.dtype
                np.testing.assert_array_equal(found, true)
            for param in params.values():
                param *= 0.9  # what the next step must notice
        for several in engines:
            assert len(several._workers) in (2, 3)
            several.close()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [AdamW, Muon])
@pytest.mark.parametrize("threads", [2, 3])
def test_an_update_by_the_workers_has_the_bits_of_one_process(threads, kind, dtype, monkeypatch):
    """Also where a part of the parameters is frozen, and other parameters are asked in between."""
    params, images, labels = drawn(CONFIG, dtype)
    true = {name: value.copy() for name, value in params.items()}
    others = {name: 0.5 * value for name, value in params.items()}
    settings = {"weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 0.01}
    optimizers = [kind(p, **settings) for p in (true, params)]
    frozen = {"pos_embed", "blocks.1.attn.gating_param", "head.bias"}
    step_here = Engine._optimize

    def load(start, stop):
        return images[start:stop], labels[start:stop]

    def in_this_process(*arguments):
        raise AssertionError("the workers were to do it")

    with (
        Engine(OBJECTIVE, 1) as one,
        ProcessEngine(OBJECTIVE, threads) as several,
    ):
        logits = one.logits(load, N, others)
        several.hold(params, optimizers[1])
        for step, n in enumerate([N, N - 7, 30, N, 200]):  # 30: a single piece, no worker's
            for engine, p, optimizer in zip(
                (one, several), (true, params), optimizers, strict=True
            ):
                grads = engine.loss_and_grads(load, n, p, 5, step)[2]
                np.testing.assert_array_equal(engine.logits(load, N, others), logits)
                grads = {name: grad for name, grad in grads.items() if name not in frozen}
                clip_grad_norm(grads, 1e-3)
                few = {name: p[name] for name in grads}
                by_workers = engine is several and n > 30
                how = in_this_process if by_workers else step_here
                monkeypatch.setattr(Engine, "_optimize", how)
                engine.update(optimizer, few, grads, lr=0.01 * (1 + step))
            assert optimizers[0].step_count == optimizers[1].step_count == 1 + step
            for name, value in true.items():
                for moment in ("exp_avg", "exp_avg_sq"):
                    found, right = (getattr(optimizer, moment)[name] for optimizer in optimizers)
                    np.testing.assert_array_equal(found, right, err_msg=f"{name} {moment}")
                np.testing.assert_array_equal(params[name], value, err_msg=name)
                assert params[name].dtype == dtype
        state = several._shared[processes.PARAMS]
        assert all(params[name] is array for name, array in state.items())
        several.hold(others, AdamW(others))  # no room for a second state: it stays as it is
        assert not any(others[name] is array for name, array in state.items())
    for name, value in true.items():  # they outlive their engine
        np.testing.assert_array_equal(params[name], value)


@pytest.mark.parametrize("count", [2, 3, 16])
def test_each_worker_updates_an_equal_share(count):
    params = init_params(VARIANTS["convit_tiny32"])
    shares = processes._shares(params, count)
    assert [name for names in shares for name in names] == list(params)
    sizes = [sum(params[name].size for name in names) for names in shares]
    largest = max(p.size for p in params.values())
    assert len(sizes) == count and max(sizes) - min(sizes) < 2 * largest


def test_a_worker_killed_in_an_update_is_reported_and_replaced(engine):
    params, images, labels = drawn(CONFIG)
    optimizer = AdamW(params)
    engine.hold(params, optimizer)

    def load(start, stop):
        return images[start:stop], labels[start:stop]

    grads = engine.loss_and_grads(load, N, params)[2]
    pids = list(engine._workers.values())
    os.kill(pids[1], signal.SIGKILL)
    os.waitid(os.P_PID, pids[1], os.WEXITED | os.WNOWAIT)
    with pytest.raises(LostUpdate, match=r"killed in the middle of an update, and .* by --resume"):
        engine.update(optimizer, params, grads)
    assert all(is_gone(pid) for pid in pids)
    _, _, grads = engine.loss_and_grads(load, N, params)
    with pytest.raises(UserError, match="expects images of shape"):
        engine.logits(lambda a, b: images[a:b, :1], N, params)
    assert not engine._workers  # they are at something that is wanted no more
    before = params["head.weight"].copy()
    engine.update(optimizer, params, grads)
    assert (params["head.weight"] != before).any()
    with Engine(OBJECTIVE, 1) as one:
        held = engine.loss_and_grads(load, N, params)
        assert_same(held, one.loss_and_grads(load, N, params))


@pytest.mark.parametrize("threads", [2, 3])
def test_the_workers_add_up_the_last_piece(threads, monkeypatch):
    """One of them is killed at it: the parameters are whole, and the next call works."""
    params, images, labels = drawn(CONFIG)
    add_shares, fatal = ProcessEngine._add_shares, mmap.mmap(-1, 1)  # shared with the workers

    def _add_shares(self, names, *arguments):
        if fatal[0] and "head.weight" in names:
            os.kill(os.getpid(), signal.SIGKILL)
        add_shares(self, names, *arguments)

    def load(start, stop):
        return images[start:stop], labels[start:stop]

    monkeypatch.setattr(ProcessEngine, "_add_shares", _add_shares)
    with (
        Engine(OBJECTIVE, 1) as one,
        ProcessEngine(OBJECTIVE, threads) as several,
    ):
        optimizer = AdamW(params)
        several.hold(params, optimizer)
        before = {name: value.copy() for name, value in params.items()}
        fatal[0] = 1
        with pytest.raises(LostWorker, match="a worker process was killed, perhaps for want of"):
            several.loss_and_grads(load, N, params)
        fatal[0] = 0
        for name, value in before.items():
            np.testing.assert_array_equal(params[name], value)
        assert_same(several.loss_and_grads(load, N, params), one.loss_and_grads(load, N, params))


def test_what_does_not_fit_together_is_left_to_the_optimizer(engine):
    """Gradients of another dtype, missing ones, no parameters at all, a state of fewer tensors."""
    params, images, labels = drawn(CONFIG)
    doubles = {name: value.astype("float64") for name, value in params.items()}
    mine, theirs = AdamW(params), AdamW(params)
    few = {name: params[name] for name in ("head.weight", "head.bias")}
    engine.hold(params, AdamW(few))  # no state for all of them: they stay where they are
    engine.hold(params, mine)
    expected = {name: value.copy() for name, value in params.items()}

    def load(start, stop):
        return images[start:stop].astype("float64"), labels[start:stop]

    grads = engine.loss_and_grads(load, N, doubles)[2]
    assert grads["head.weight"].dtype == "float64"
    engine.update(mine, params, grads)
    theirs.step(expected, grads)
    for name, value in expected.items():
        np.testing.assert_array_equal(params[name], value, err_msg=name)
    grads = engine.loss_and_grads(lambda a, b: (images[a:b], labels[a:b]), N, params)[2]
    del grads["head.bias"]
    with pytest.raises(UserError, match=r"head\.bias"):
        engine.update(mine, {"head.bias": params["head.bias"]}, grads)
    count = mine.step_count
    engine.update(mine, {}, {})
    assert mine.step_count == count + 1
    head = params.pop("head.bias")
    with pytest.raises(UserError, match=r"head\.bias"):
        engine.logits(lambda start, stop: images[start:stop], N, params)
    params["head.bias"] = head
    assert np.isfinite(engine.logits(lambda start, stop: images[start:stop], N, params)).all()


def test_an_interruption_while_workers_are_ended_leaves_none(engine, monkeypatch):
    params, images, labels = drawn(CONFIG)

    def load(start, stop):
        return images[start:stop], labels[start:stop]

    def interrupted(*arguments):
        raise KeyboardInterrupt

    true = engine.loss_and_grads(load, N, params)
    pids = list(engine._workers.values())
    with monkeypatch.context() as patch:
        patch.setattr(processes.os, "waitpid", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.loss_and_grads(interrupted, N, params)
    for pid in pids:
        os.waitpid(pid, 0)  # all are killed, though not waited for
    assert_same(engine.loss_and_grads(load, N, params), true)


def test_what_was_given_out_is_not_changed_by_the_next_call(engine):
    """But gradients are, as promised, by the next gradients."""
    params, images, labels = drawn(CONFIG)

    def load(start, stop):
        return images[start:stop], labels[start:stop]

    first = engine.loss_and_grads(load, N, params)
    kept = {name: grad.copy() for name, grad in first[2].items()}
    logits = engine.logits(load, N, params)
    kept_logits = logits.copy()
    for param in params.values():
        param += 0.3
    engine.logits(load, N, params)
    assert_same(first, (*first[:2], kept))
    engine.loss_and_grads(load, N, params)
    np.testing.assert_array_equal(logits, kept_logits)


def test_workers_begin_and_end_with_the_engine():
    params, images, labels = drawn(CONFIG)
    with ProcessEngine(OBJECTIVE, 2) as engine:
        pids = list(engine._workers.values())
        assert len(pids) == 2
        with Engine(OBJECTIVE, 1) as one:
            given = lambda a, b: (images[a:b], labels[a:b]), 41, params  # one piece needs no worker
            assert_same(engine.loss_and_grads(*given), one.loss_and_grads(*given))
            for each in (one, engine):
                with pytest.raises(UserError, match="a batch needs at least one image"):
                    each.loss_and_grads(given[0], 0, params)
        idle = engine.memory_mb()
        engine.logits(lambda a, b: images[a:b], N, params)
        assert list(engine._workers.values()) == pids
        assert engine.memory_mb() > idle
    assert all(is_gone(pid) for pid in pids)
    engine.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(pids[0], 0)  # no zombie is left


@pytest.mark.parametrize("kind", [Engine, ProcessEngine])
def test_a_closed_engine_refuses_all_work_and_starts_no_worker(kind, monkeypatch):
    params, images, labels = drawn(CONFIG)
    optimizer = AdamW(params)
    engine = kind(OBJECTIVE, 2)
    engine.close()
    monkeypatch.setattr(processes.os, "fork", None)  # a call would fail
    before = {name: value.copy() for name, value in params.items()}
    for n in (1, N):
        for use in (
            lambda n=n: engine.loss_and_grads(lambda a, b: (images[a:b], labels[a:b]), n, params),
            lambda n=n: engine.logits(lambda a, b: images[a:b], n, params),
            lambda: engine.update(optimizer, params, before),
            lambda: engine.hold(params, optimizer),
        ):
            with pytest.raises(UserError, match="this engine is closed: make another one"):
                use()
    assert optimizer.step_count == 0
    assert all(np.array_equal(params[name], value) for name, value in before.items())


def test_the_memory_of_a_dead_worker_is_none(engine):
    params, images, _ = drawn(CONFIG)
    engine.logits(lambda a, b: images[a:b], N, params)
    pids = list(engine._workers.values())
    for pid, expected in zip(pids, (True, False), strict=True):
        os.kill(pid, signal.SIGKILL)
        assert is_gone(pid)
        assert (engine.memory_mb() > 0) == expected  # what the others hold


def test_a_dropped_engine_leaves_no_process_and_gives_blas_its_threads_back():
    wanted = ONE_BLAS_THREAD._wanted
    engine = ProcessEngine(OBJECTIVE, 2)
    pids = list(engine._workers.values())
    assert ONE_BLAS_THREAD._wanted == wanted + 1
    del engine
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists()  # not even a zombie
    assert ONE_BLAS_THREAD._wanted == wanted


def test_a_worker_keeps_no_file_of_its_parent_open(tmp_path):
    """Such as the locked log of a run, whose lock shall end with the process that trains."""
    with open(tmp_path / "log", "ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with ProcessEngine(OBJECTIVE, 3) as engine:
            params, images, _ = drawn(CONFIG)
            engine.logits(lambda a, b: images[a:b], N, params)  # all of them have begun
            for pid in engine._workers.values():
                kept = os.listdir(f"/proc/{pid}/fd")
                assert {int(fd) for fd in kept if int(fd) > 2} <= {
                    int(fd) for fd in kept if "socket" in os.readlink(f"/proc/{pid}/fd/{fd}")
                }
                assert len([fd for fd in kept if int(fd) > 2]) == 1  # its end of the pipe
            log.close()
            with open(tmp_path / "log", "ab") as again:
                fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_make_engine_takes_processes_for_more_than_one_worker(monkeypatch):
    with (
        make_engine(OBJECTIVE, np, 1) as one,
        make_engine(OBJECTIVE, np, 3) as three,
    ):
        assert (type(one), one.workers) == (Engine, 1)
        assert (type(three), three.workers) == (ProcessEngine, 3)
    monkeypatch.setattr(sys, "platform", "darwin")
    with make_engine(OBJECTIVE, np, 3) as three:
        assert (type(three), three.workers) == (Engine, 3)


def test_an_error_while_loading_or_computing_is_raised_and_the_next_call_works(engine):
    params, images, labels = drawn(CONFIG)

    def load(start, stop):
        return images[start:stop], labels[start:stop]

    def broken(start, stop):
        if start:
            raise UserError("this image is broken")
        return load(start, stop)

    true = engine.loss_and_grads(load, N, params)
    with pytest.raises(UserError, match="this image is broken"):
        engine.loss_and_grads(broken, N, params)
    assert_same(engine.loss_and_grads(load, N, params), true)
    with pytest.raises(UserError, match="expects images of shape"):
        engine.loss_and_grads(lambda a, b: (images[a:b, :1], labels[a:b]), N, params)
    large = images.repeat(3, axis=3)
    with pytest.raises(
        UserError, match=r"expects images .* of \(2, 24, 32\), not \(37, 2, 24, 96\)"
    ):
        engine.loss_and_grads(lambda a, b: (large[a:b], labels[a:b]), N, params)
    assert_same(engine.loss_and_grads(load, N, params), true)


def test_a_worker_that_is_killed_is_reported_and_replaced(engine):
    params, images, labels = drawn(CONFIG)

    def load(start, stop):
        return images[start:stop], labels[start:stop]

    true = engine.loss_and_grads(load, N, params)

    def kill(start, stop):
        if start > 80:
            os.kill(next(iter(engine._workers.values())), signal.SIGKILL)
        return load(start, stop)

    with pytest.raises(UserError, match="a worker process was killed, perhaps for want of memory"):
        engine.loss_and_grads(kill, N, params)
    assert_same(engine.loss_and_grads(load, N, params), true)
    for pid in engine._workers.values():  # between two calls
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(UserError, match="a worker process was killed"):
        engine.loss_and_grads(load, N, params)
    assert_same(engine.loss_and_grads(load, N, params), true)


def test_an_interruption_while_sums_are_made_leaves_no_answer_behind(engine, monkeypatch):
    """Its traceback, which a notebook keeps, must not keep the call half done."""
    params, images, labels = drawn(CONFIG)

    def load(start, stop):
        return images[start:stop], labels[start:stop]

    true = engine.loss_and_grads(load, N, params)

    def interrupted(self, answers, n):
        next(answers), next(answers)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProcessEngine, "_summed", interrupted)
        with pytest.raises(KeyboardInterrupt) as kept:
            engine.loss_and_grads(load, N, params)
    params = {name: 0.5 * value for name, value in params.items()}
    found = engine.loss_and_grads(load, N, params)
    assert kept.tb is not None and found[0] != true[0]
    with Engine(OBJECTIVE, 1) as one:
        assert_same(found, one.loss_and_grads(load, N, params))


def test_an_interruption_while_workers_are_started_leaves_none(monkeypatch):
    fork, forked = os.fork, []

    def interrupted():
        if forked:
            raise KeyboardInterrupt
        forked.append(fork())
        return forked[0]

    with ProcessEngine(OBJECTIVE, 2) as engine:
        engine._stop()
        monkeypatch.setattr(processes.os, "fork", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine._start()
        assert not engine._workers and is_gone(forked[0])


def test_where_no_process_can_be_forked_one_thread_is_advised(monkeypatch):
    fork, forked, wanted = os.fork, [], ONE_BLAS_THREAD._wanted

    def fail():
        if forked:
            raise OSError(11, "Resource temporarily unavailable")
        forked.append(fork())
        return forked[0]

    with monkeypatch.context() as patch:
        patch.setattr(processes.os, "fork", fail)
        with pytest.raises(UserError, match=r"\(Resource temporarily .*\): add --workers 1"):
            ProcessEngine(OBJECTIVE, 2)
    assert is_gone(forked[0])
    assert ONE_BLAS_THREAD._wanted == wanted


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A function that trains in a folder of this name, on two workers."""
    monkeypatch.setattr("miniconvit.training.run.load_dataset", small_dataset)
    small = {"img_size": 8, "patch_size": 1, "batch_size": 48, "epochs": 3, "seed": 3}
    settings = make_settings(model="convit_micro32", **small)

    def run(name, **options):
        return training.train(settings, tmp_path / name, workers=2, quiet=True, **options)

    return run


def assert_same_files(one, other):
    for name in ("last.safetensors", "best.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_a_run_that_has_lost_a_worker_is_saved_and_goes_on_to_the_bit(train, monkeypatch):
    whole = train("whole").folder
    step = training.train_step

    def lose_a_worker(run, state, load):
        if state.step == 3:
            os.kill(next(iter(run.engine._workers.values())), signal.SIGKILL)
        step(run, state, load)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", lose_a_worker)
        with pytest.raises(UserError, match="run is saved after step 3: it goes on"):
            train("parts")
    assert_same_files(train("parts", resume=True).folder, whole)


def test_a_run_that_has_lost_a_worker_in_an_update_goes_on_from_its_last_save(
    train, tmp_path, monkeypatch
):
    whole = train("whole").folder
    update = ProcessEngine.update

    def lose_a_worker(self, optimizer, *arguments):
        if optimizer.step_count == 5:
            os.kill(next(iter(self._workers.values())), signal.SIGKILL)
        update(self, optimizer, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ProcessEngine, "update", lose_a_worker)
        with pytest.raises(LostUpdate, match="goes on from its last save by --resume"):
            train("parts")
    saved = load_checkpoint(tmp_path / "parts" / "last.safetensors")
    assert 0 < saved.state["step"] < 5  # the end of an epoch
    assert_same_files(train("parts", resume=True).folder, whole)


def test_workers_do_not_speak_of_overflow(engine):
    """They are forked with the settings of NumPy that are in force."""
    params, images, _ = drawn(CONFIG)
    images[120] = 3e38
    with np.errstate(all="raise"):
        logits = engine.logits(lambda a, b: images[a:b], N, params)
    assert not np.isfinite(logits[120]).any() and np.isfinite(logits[:100]).all()


ENDLESS = """
import sys
import numpy as np
from miniconvit.config import VARIANTS
from miniconvit.model import init_params
from miniconvit.engine.objective import Classification
from miniconvit.engine.processes import ProcessEngine
config = VARIANTS["convit_micro32"]
params, images = init_params(config), np.zeros((64, 3, 32, 32), "float32")
with ProcessEngine(Classification(config), 2) as engine:
    while True:
        engine.logits(lambda a, b: images[a:b], 64, params)
        print(*engine._workers.values(), flush=True)
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_process_that_asks(signum):
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as asking:
        pids = [int(word) for word in asking.stdout.readline().split()]
        assert len(pids) == 2
        asking.send_signal(signum)
        assert asking.wait(20) != 0
    assert all(is_gone(pid) for pid in pids)


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_to_the_whole_group_saves_the_run(tmp_path, signum, status):
    """As Ctrl-C in a terminal, its end, and some cluster's end of a job reach the workers too."""
    small = {"--patch-size": 1, "--batch-size": 64, "--epochs": 2000, "--workers": 2}
    flags = [*FLAGS, *(str(word) for pair in small.items() for word in pair)]
    command = [sys.executable, ROOT / "tests" / "small_run.py", "train", *flags]
    with subprocess.Popen(
        [*command, "--out", tmp_path / "run"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as training:
        for line in training.stdout:
            if line.strip().startswith("2 "):  # the second epoch
                break
        children = Path(f"/proc/{training.pid}/task/{training.pid}/children").read_text().split()
        assert len(children) == 2
        os.killpg(training.pid, signum)
        _, err = training.communicate(timeout=60)
    assert all(is_gone(int(pid)) for pid in children)
    assert training.returncode == status
    assert "and saved; go on with" in err and "Error" not in err
    assert err.count("stopping after this step") == 1
