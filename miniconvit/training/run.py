"""What of a training run stays as it is from its first step to its last, and how it is set up."""

from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass, field
from io import StringIO
from math import inf
from typing import Any

from ..checkpoints.weights import read_start
from ..data import Dataset, fingerprint, load_dataset, on_device
from ..engine import connect, make_engine
from ..engine.cuda import check_precision, resolve_device, without_reason
from ..engine.ranks import Ranks
from ..errors import UserError
from ..neighbours.models import count_parameters
from ..system import arithmetic
from .freeze import frozen_names
from .objectives import objective_of
from .report import Report
from .run_folder import RunFolder, UnwrittenFolder, describe
from .schedule import Schedule, make_schedule
from .settings import (
    Settings,
    refuse_difference,
    stored_data_dir,
    stored_settings,
    stored_sha256,
)
from .state import begin_state, load_state


@dataclass(frozen=True)
class Run:
    """One training run; what its steps change is its TrainingState.

    data: the dataset where the engine computes; frozen: names of parameters that are not trained;
    requests: signals that asked it to stop, see note_signals.
    """

    settings: Settings
    schedule: Schedule
    dataset: Dataset
    data: Dataset
    engine: Any
    folder: RunFolder
    frozen: set
    report: Report
    ranks: Ranks
    requests: list = field(default_factory=list)

    @property
    def config(self):
        """What the model is."""
        return self.engine.objective.config

    @property
    def about(self):
        """What a checkpoint says of the data."""
        dataset = self.dataset
        about = {"mean": [float(x) for x in dataset.mean], "std": [float(x) for x in dataset.std]}
        return about | {"classes": list(dataset.classes), "data": dataset.name}

    def say(self, *texts):
        """Logs lines and shows them."""
        self.ranks.first(self.folder.log, "\n".join(texts))
        self.report.lines(*texts)


@contextmanager
def open_run(settings, out, resume, data_dir, download, workers, device, quiet, report, ranks):
    """Sets a run up, or takes it up again, as `train` describes it, and closes its folder after it.

    Yields (Run, TrainingState, lines): what to say before the first step.
    """
    s, folder = settings, (UnwrittenFolder if ranks.rank else RunFolder)(out)
    ranks.same(asdict(s), "{1} has other settings than {0}: start all ranks alike")
    known_dir, has_begun = ranks.first(_may_begin, folder, s, resume)
    data_dir = data_dir or known_dir
    if workers is not None and workers < 1:
        raise UserError(f"--workers must be at least 1, not {workers}")
    xp, place = ranks.agree(resolve_device, device)
    ranks.agree(check_precision, s.precision, xp)
    ranks = connect(ranks, xp)
    dataset = _loaded(ranks, s, data_dir, download and not has_begun)
    hashes = {"data_sha256": fingerprint(dataset)}
    ranks.same(hashes, "the images of {1} are not those of {0}: put the same files on both")
    ranks.first(_refuse_other_images, folder, hashes["data_sha256"])
    config, schedule = s.model_config(dataset), make_schedule(s, len(dataset.train.labels))
    frozen = frozen_names(config, s.freeze)
    objective = objective_of(s, config)
    ranks.first(folder.open, resume)
    try:
        with ranks.agree(make_engine, objective, xp, workers, s.precision, ranks) as engine:
            ranks.weigh(engine.workers)

            def first_state():
                """(state, lines): as saved, or new, with config.json."""
                if resume and folder.last.exists():
                    state = load_state(folder.last, s, config, schedule, xp)
                    folder.cut_metrics(state.epoch)
                    if state.best is not None:
                        folder.require_best()
                    return state, []
                lines, start = [], None
                if resume:
                    lines = [f"nothing is saved in {folder.path} yet: the run begins at step 1"]
                if s.init_from is not None:
                    known = stored_sha256(out, "init_sha256")
                    start = read_start(s.init_from, config, dataset.classes, known)
                    hashes["init_sha256"] = start.sha256
                    lines.append(start.text)
                state = begin_state(s, config, xp, start)
                folder.cut_metrics(0)
                known = {name: value for name, value in hashes.items() if value}
                about = describe(s, config, data_dir, engine.workers, without_reason(place))
                folder.write_config(about | known)
                return state, lines

            state, notes = ranks.first(first_state)
            data = on_device(dataset, xp)
            trained = [name for name in state.params if name not in frozen]
            limits = s.clip_grad or inf, s.ema
            engine.hold(state.params, state.optimizer, state.ema, trained, *limits)
            images = [steps * schedule.batch_size for steps in (schedule.total_steps, state.step)]
            shown = report(*images, schedule.epochs, quiet or ranks.rank > 0)
            run = Run(s, schedule, dataset, data, engine, folder, frozen, shown, ranks)
            yield run, state, [*_first_lines(run, state, notes, place)]
    finally:
        folder.close()


def _may_begin(folder, settings, resume):
    """(where the images of a run that has begun here lie, whether one has begun). Raises UserError
    where the folder is no place for this run."""
    folder.check(resume)
    stored = stored_settings(folder.path)
    if stored is None:
        return None, False
    refuse_difference(stored, asdict(settings), folder.path)
    return stored_data_dir(folder.path), True


def _loaded(ranks, s, data_dir, download):
    """The data set. The first rank of each machine goes first, and may have to download it."""

    def load():
        with redirect_stderr(StringIO()) if ranks.rank else nullcontext():  # the notes of rank 0
            return load_dataset(s.data, data_dir, download, s.subset, s.img_size, s.broken)

    turns = [
        ranks.agree(load if (ranks.place == 0) == turn else lambda: None) for turn in (True, False)
    ]
    return turns[0] or turns[1]


def _refuse_other_images(folder, sha256):
    if stored_sha256(folder.path, "data_sha256") not in (None, sha256):
        raise UserError(
            f"the image files are not those with which the run in {folder.path} began: put back "
            "what was added, removed or renamed, or begin another run with another --out"
        )


def _first_lines(run, state, notes, place):
    """What to say before the first step."""
    yield from _ranks_lines(run.ranks)
    yield from _introduction(run, state)
    yield from notes
    yield place
    if state.step:
        yield f"resumed after step {state.step} of {run.schedule.total_steps}"
        yield from _other_arithmetic(run.folder)


def _ranks_lines(ranks):
    """Who trains, and what keeps the bits of some ranks from being those of others."""
    if ranks.line:
        yield ranks.line
    kinds = {(kind["numpy"], kind["blas"], kind["numba"]) for kind in ranks.all(arithmetic())}
    if len(kinds) > 1:
        versions = ", ".join(
            sorted(f"NumPy {numpy} with {blas} and Numba {numba}" for numpy, blas, numba in kinds)
        ).replace("Numba None", "no Numba")
        yield f"the last digits depend on who computes what: the machines have {versions}"


def _other_arithmetic(folder):
    """A line where the libraries or the processor are not those with which the run began."""
    before, now = (folder.config() or {}).get("versions"), arithmetic()
    if isinstance(before, dict):
        known = {name: before[name] for name in now if name in before}
        changes = [
            f"{name} {now[name] or 'none'} in place of {old or 'none'}"
            for name, old in known.items()
            if old != now[name]
        ]
        if changes:
            yield f"from here on the last digits may differ: {', '.join(changes)}"


def _introduction(run, state):
    """What is trained, on what, for how long and where it is kept."""
    dataset, schedule, workers = run.dataset, run.schedule, run.engine.workers
    parameters = count_parameters(run.config)
    asked, most = run.settings.batch_size, schedule.batch_size
    smaller = f"there are fewer images than --batch-size {asked}: a step takes all {most}"
    on_workers = f" on {workers} worker{'s' * (workers > 1)}" if workers else ""  # none: a GPU
    on_workers *= run.ranks.size == 1  # else it has been said
    return (
        f"{run.settings.model}, {parameters:,} parameters, on {dataset.name}: "
        f"{len(dataset.train.labels):,} images to train, {len(dataset.val.labels):,} "
        f"to validate, {len(dataset.classes)} classes",
        f"{schedule.total_steps:,} step{'s' * (schedule.total_steps > 1)} of "
        f"{schedule.batch_size} images in {schedule.epochs} "
        f"epoch{'s' * (schedule.epochs > 1)}{on_workers}, kept in {run.folder.path}",
        *([smaller] if asked > most else []),
    )
