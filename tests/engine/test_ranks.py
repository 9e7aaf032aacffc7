"""Ranks, on threads with a stand-in for MPI's messages: equal sums, one end for all, and what is
said where no one can be found. Real ones: tests/training/test_mpi.py."""

import importlib
import os
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from miniconvit import UserError, init_params
from miniconvit.config import ConViTConfig
from miniconvit.engine import gpu as engine_gpu
from miniconvit.engine import nccl as engine_nccl
from miniconvit.engine import ranks as engine_ranks
from miniconvit.engine.nccl import SharingEngine
from miniconvit.engine.objective import Classification, classification
from miniconvit.engine.pieces import Tree
from miniconvit.engine.ranks import LostRank, Mpi, Ranks, find_ranks
from miniconvit.engine.threads import Engine
from miniconvit.neighbours.mobile import MobileConfig
from miniconvit.neighbours.models import MODELS
from miniconvit.system import LAUNCHERS, limited

CONFIG = ConViTConfig((24, 32), (4, 8), 2, 5, 12, 4, 4, 2.0, True, 3, drop_path_rate=0.3)


class Messages:
    """A communicator on threads: what MPI promises of Isend and Irecv between two ranks."""

    def __init__(self, wires, rank, size):
        self.wires, self.rank, self.size, self.aborted = wires, rank, size, []
        self.wanted = {other: deque() for other in range(size)}
        self.Abort = self.aborted.append

    def Dup(self):
        return self

    def Isend(self, x, to):
        self.wires[self.rank, to].append(x.copy())
        return SimpleNamespace(Test=lambda: True)

    def Irecv(self, x, source):
        missing = [x]
        self.wanted[source].append(missing)
        return SimpleNamespace(Test=lambda: self._test(source, missing))

    def _test(self, source, missing):
        wire = self.wires[source, self.rank]
        while wire and self.wanted[source]:
            self.wanted[source].popleft().pop()[...] = wire.popleft()
        return not missing


def together(size, function):
    """What function(ranks) gives on each of so many ranks, in order."""
    wires = {(a, b): deque() for a in range(size) for b in range(size)}

    def run(rank):
        comm = Messages(wires, rank, size)
        return function(Mpi(SimpleNamespace(COMM_WORLD=comm, Exception=RuntimeError)))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def added(left, right):
    left += right


def test_whoever_has_which_pieces_all_ranks_get_the_bits_of_one():
    rng = np.random.default_rng(0)
    for size in (2, 3, 5, 8):
        for n in (1, 2, 7, 12, 64):
            workers = rng.integers(1, 9, size).tolist()
            pieces = rng.normal(size=(n, 37)) * 10.0 ** rng.integers(-6, 7, (n, 1))
            pieces = pieces.astype("float32")
            alone = Tree(added)
            for index in range(n):
                alone.put(0, index, pieces[index].copy())
            true = alone.root()

            def share(ranks, n=n, pieces=pieces, workers=workers):
                ranks.weigh(workers[ranks.rank])
                tree = Tree(added)
                for index in ranks.share(n):
                    tree.put(0, index, pieces[index].copy())
                first = next(iter(tree.nodes.values()), None)
                out = np.empty(37, "float32") if first is None else first  # as engines do
                ranks.sum(tree.nodes, n, out)
                return list(ranks.share(n)), out

            found = together(size, share)
            assert [index for indices, _ in found for index in indices] == list(range(n))
            assert {out.tobytes() for _, out in found} == {true.tobytes()}


MOBILE = MobileConfig(img_size=(8, 16), strides=(2, 4), in_chans=2, num_classes=5, num_heads=2)


@pytest.mark.parametrize("config", [CONFIG, MOBILE], ids=["convit", "batch statistics"])
@pytest.mark.parametrize("n", [300, 40])
def test_engines_on_ranks_have_the_bits_of_one(n, config):
    """40 images are a single piece of the first: the other ranks only learn of it."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((n, config.in_chans, *config.image)).astype("float32")
    labels, params = rng.integers(config.num_classes, size=n), MODELS[type(config)].init(config, 0)
    asked = []

    def load(start, stop):
        asked.append((start, stop))
        return images[start:stop], labels[start:stop]

    def step(ranks):
        with Engine(classification(config, 0.1), 1, ranks=ranks) as engine:
            return engine.loss_and_grads(load, n, params, 3, 8), engine.logits(load, n, params)

    (true, logits), alone = step(Ranks()), sorted(asked)
    asked.clear()
    for found, answers in together(3, step):
        assert found[:2] == true[:2] and list(found[2]) == list(true[2])
        assert all(np.array_equal(found[2][name], grad) for name, grad in true[2].items())
        np.testing.assert_array_equal(answers, logits)
    assert sorted(asked) == alone  # each piece was loaded once


def test_a_piece_a_rank_as_on_gpus_adds_up_to_the_whole_batch(monkeypatch):
    """On NumPy's arrays in float64: the same drop path and, but for rounding, the same sums."""
    monkeypatch.setattr(engine_gpu, "kernels", None)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((20, CONFIG.in_chans, *CONFIG.image))
    labels = rng.integers(CONFIG.num_classes, size=20)
    params, objective = init_params(CONFIG, dtype="float64"), Classification(CONFIG, 0.1)

    def load(start, stop):
        return images[start:stop], labels[start:stop]

    def step(ranks):
        engine = SharingEngine(objective, np, "float32", ranks)
        with pytest.raises(UserError, match="2 images are fewer than 3 ranks: start fewer"):
            engine.loss_and_grads(load, 2, params)
        return engine.loss_and_grads(load, 20, params, 3, 8), engine.logits(load, 20, params)

    with Engine(objective, 1) as one:
        true, logits = one.loss_and_grads(load, 20, params, 3, 8), one.logits(load, 20, params)
    found = together(3, step)
    for (loss, correct, grads), answers in found:
        assert loss == pytest.approx(true[0], rel=1e-12) and correct == true[1]
        for name, grad in true[2].items():
            np.testing.assert_allclose(grads[name], grad, rtol=1e-9, atol=1e-14)
            assert grads[name].tobytes() == found[0][0][2][name].tobytes()
        np.testing.assert_allclose(answers, logits, rtol=1e-12)


class FakeNccl:
    """cupy.cuda.nccl on threads: groups of send and receive, of NumPy's memory."""

    NCCL_FLOAT32, NCCL_FLOAT64 = 7, 8
    get_version = staticmethod(lambda: 22700)

    def __init__(self):
        self.calls = []

    def get_unique_id(self):
        return "an id"

    def groupStart(self):
        self.calls.append("start")

    def groupEnd(self):
        self.calls.append("end")

    def NcclCommunicator(self, size, ident, rank):
        assert ident == "an id"

        def note(name):
            return lambda pointer, count, kind, peer, stream: self.calls.append(
                (name, pointer, count, kind, peer, stream)
            )

        return SimpleNamespace(send=note("send"), recv=note("recv"))


def test_nccl_is_given_the_same_messages_in_groups(monkeypatch):
    """Two ranks, what is sent and to whom; a GPU each, which they have not in common."""
    nccl = threading.local()
    monkeypatch.setattr(engine_nccl, "import_module", lambda name: nccl.module)

    def vector(pointer, size):
        return SimpleNamespace(data=SimpleNamespace(ptr=pointer), size=size, dtype="float32")

    def talk(ranks, gpus=2):
        nccl.module, chosen = FakeNccl(), []
        runtime = SimpleNamespace(
            setDevice=chosen.append,
            getDeviceCount=lambda: gpus,
            getDevice=lambda: chosen[-1],
            deviceGetPCIBusId=lambda device: f"0000:0{device}",
        )
        stream = SimpleNamespace(get_current_stream=lambda: SimpleNamespace(ptr=5))
        xp = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, **vars(stream)))
        found = engine_nccl.connect(ranks, xp)
        other = 1 - ranks.rank
        found.exchange([(other, vector(1, 10))], [(other, vector(2, 20)), (other, vector(3, 30))])
        return chosen, nccl.module.calls

    for rank, (chosen, calls) in enumerate(together(2, talk)):
        assert chosen == [rank]
        sent = [("send", 2, 20, 7, 1 - rank, 5), ("send", 3, 30, 7, 1 - rank, 5)]
        assert calls == ["start", *sent, ("recv", 1, 10, 7, 1 - rank, 5), "end"]
    with pytest.raises(UserError, match=r"two ranks have the same GPU \(0000:00\): start as many"):
        together(2, lambda ranks: talk(ranks, 1))
    monkeypatch.setattr(engine_nccl, "import_module", importlib.import_module)
    monkeypatch.setitem(sys.modules, "cupy.cuda.nccl", None)
    with pytest.raises(UserError, match=r"need NCCL, .* pip install nvidia-nccl-cu13"):
        together(2, lambda ranks: engine_nccl.connect(ranks, SimpleNamespace()))
    assert engine_nccl.connect(alone := Ranks(), SimpleNamespace()) is alone


def test_what_one_rank_finds_out_ends_all_alike():
    def fail(ranks):
        def load():
            if ranks.rank == 1:
                raise UserError("this image is broken")
            return 7

        found = [ranks.each(lambda: ranks.rank), ranks.first(lambda: "a"), ranks.agree(lambda: 5)]
        for attempt in (
            lambda: ranks.each(load),
            lambda: ranks.same(ranks.rank == 2, "{1} is not {0}"),
        ):
            with pytest.raises(UserError) as error:
                attempt()
            found.append(str(error.value))
        return found

    host = os.uname().nodename
    same = f"rank 2 on {host} is not rank 0 on {host}"
    assert together(3, fail) == [[[0, 1, 2], "a", 5, "this image is broken", same]] * 3


def test_a_rank_that_does_not_answer_is_named():
    done = threading.Event()

    def wait(ranks):
        ranks.patience = 0.2
        if ranks.rank == 1:
            done.wait(60)
            return None
        with pytest.raises(LostRank, match=r"rank 1 on .* has not answered .* by --resume") as lost:
            ranks.all(None)
        done.set()
        return lost.value.everywhere

    assert together(2, wait) == [False, None]


def test_patience_grows_with_the_steps(monkeypatch):
    clock = iter([0.0, 10.0])
    monkeypatch.setattr(engine_ranks.time, "monotonic", lambda: next(clock))
    ranks = Ranks()
    ranks.each(lambda: None, patience=None)
    assert ranks.patience == 200


@pytest.mark.parametrize(
    ("error", "text", "status"),
    [
        (LostRank("rank 0 is gone"), "Error: rank 1 on HOST: rank 0 is gone\n", 2),
        (OSError(28, "No space left"), "Error: rank 1 on HOST: [Errno 28] No space left\n", 2),
        (KeyboardInterrupt(), "stopped\n", 130),
        (ZeroDivisionError("a bug"), "ZeroDivisionError: a bug\n", 2),
    ],
)
def test_what_ends_one_rank_ends_all(error, text, status, monkeypatch, capfd):
    monkeypatch.setattr(engine_ranks.os, "_exit", lambda status: sys.exit(status))
    monkeypatch.setattr(engine_ranks.signal, "alarm", lambda seconds: None)
    monkeypatch.setattr(engine_ranks, "_launcher", lambda: None)

    def fail(ranks):
        if ranks.rank == 1:
            with pytest.raises(SystemExit) as end, ranks.guard():
                raise error
            return ranks._comm.aborted, end.value.code
        with pytest.raises(UserError, match="agreed"), ranks.guard():
            raise UserError("agreed on")
        return ranks._comm.aborted, 0

    assert together(2, fail) == [([], 0), ([status], status)]
    assert capfd.readouterr().err.endswith(text.replace("HOST", os.uname().nodename))


def test_workers_are_the_cores_of_a_machine_by_the_ranks_on_it(monkeypatch):
    cores = {0: {0, 1, 2, 3}, 1: {4, 5, 6, 7}, 2: {0, 1}}
    machines = {0: "a", 1: "a", 2: "b"}

    def count(ranks):
        monkeypatch.setattr(engine_ranks, "available_cores", lambda untie: own.cores)
        own.cores = cores[ranks.rank]
        ranks.machine = machines[ranks.rank], ""
        ranks._machines = ranks.all(ranks.machine)
        found = ranks.workers()
        ranks.weigh(found)
        return found, ranks.line, list(ranks.share(10))

    own = threading.local()
    monkeypatch.setattr(engine_ranks, "limited", lambda count: count)
    line = "3 ranks on 2 machines (a, b), 4 and 2 workers each"
    shares = [range(4), range(4, 8), range(8, 10)]
    found = together(3, count)
    assert found == [(workers, line, list(s)) for workers, s in zip((4, 4, 2), shares, strict=True)]
    assert limited(10**6, "/nowhere") == 10**6


# how they are found


@pytest.fixture
def started(monkeypatch):
    """Sets what a launcher of two would set; find_ranks begins anew."""

    def start(launcher=1):
        size, rank, _ = LAUNCHERS[launcher]
        monkeypatch.setenv(size, "2")
        monkeypatch.setenv(rank, "0")

    for size, rank, _ in LAUNCHERS:
        monkeypatch.delenv(size, raising=False)
        monkeypatch.delenv(rank, raising=False)
    find_ranks.cache_clear()
    yield start
    find_ranks.cache_clear()


def stand_in(monkeypatch, vendor, size):
    """mpi4py as far as find_ranks looks at it."""
    world = Messages({(0, other): deque() for other in range(size)}, 0, size)
    MPI = SimpleNamespace(
        COMM_WORLD=world,
        Exception=RuntimeError,
        get_vendor=lambda: (vendor, (5, 0, 0)),
        Is_initialized=lambda: True,
    )
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=MPI, rc=SimpleNamespace()))
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", MPI)


def test_without_a_launcher_mpi_is_never_imported(started, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert type(find_ranks()) is Ranks
    monkeypatch.setenv("PMI_SIZE", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "many")
    assert type(find_ranks()) is Ranks


def test_a_missing_mpi4py_and_a_missing_library_are_one_sentence_each(started, monkeypatch):
    started()
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r"started 2 times by mpirun, but mpi4py is not .*mpi4py$"):
        find_ranks()

    class WithoutLibrary(SimpleNamespace):
        @property
        def MPI(self):
            raise RuntimeError("cannot load MPI library\nlibmpi.so: cannot open\n")

    monkeypatch.setitem(sys.modules, "mpi4py", WithoutLibrary(rc=SimpleNamespace()))
    with pytest.raises(UserError, match=r"no MPI library \(cannot load MPI library\): load your"):
        find_ranks()


@pytest.mark.parametrize(
    ("launcher", "vendor", "size", "words"),
    [
        (0, "MPICH", 1, "this mpirun is of another MPI than mpi4py's (MPICH)"),
        (1, "Open MPI", 1, "this mpirun is of another MPI than mpi4py's (Open MPI)"),
        (1, "MPICH", 1, "this mpirun is of another MPI than mpi4py's (MPICH)"),
        (2, "Open MPI", 1, "mpi4py's Open MPI finds itself alone: srun --mpi=list"),
    ],
)
def test_a_launcher_of_another_mpi_is_one_sentence(
    started, monkeypatch, launcher, vendor, size, words
):
    started(launcher)
    stand_in(monkeypatch, vendor, size)
    with pytest.raises(UserError) as error:
        find_ranks()
    assert words in str(error.value) and "started 2 times by" in str(error.value)


def test_other_commands_are_not_started_several_times(started, program):
    started()
    status, out, err = program("eval", "somewhere")
    assert (status, out) == (2, "")
    assert err.startswith("Error: started 2 times by mpirun, and only train shares its work")
