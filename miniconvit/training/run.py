"""What of a training run stays as it is from its first step to its last, and how it is set up."""

from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any

from ..checkpoints.weights import read_start
from ..data import Dataset, fingerprint, load_dataset, on_device
from ..engine import make_engine
from ..engine.cuda import check_precision, resolve_device, without_reason
from ..errors import UserError
from ..system import arithmetic
from .freeze import frozen_names
from .objectives import objective_of
from .report import Report
from .run_folder import RunFolder, describe
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
        for text in texts:
            self.folder.log(text)
        self.report.lines(*texts)


@contextmanager
def open_run(settings, out, resume, data_dir, download, workers, device, quiet, report):
    """Sets a run up, or takes it up again, as `train` describes it, and closes its folder after it.

    Yields (Run, TrainingState, lines): what to say before the first step.
    """
    s, folder = settings, RunFolder(out)
    folder.check(resume)
    if (stored := stored_settings(out)) is not None:
        refuse_difference(stored, asdict(s), out)
        data_dir, download = data_dir or stored_data_dir(out), False
    if workers is not None and workers < 1:
        raise UserError(f"--workers must be at least 1, not {workers}")
    xp, place = resolve_device(device)
    check_precision(s.precision, xp)
    dataset = load_dataset(s.data, data_dir, download, s.subset, s.img_size, s.broken)
    hashes = {"data_sha256": fingerprint(dataset)}
    if stored_sha256(out, "data_sha256") not in (None, hashes["data_sha256"]):
        raise UserError(
            f"the image files are not those with which the run in {out} began: put back what was "
            "added, removed or renamed, or begin another run with another --out"
        )
    config, schedule = s.model_config(dataset), make_schedule(s, len(dataset.train.labels))
    frozen = frozen_names(config, s.freeze)
    folder.open(resume)
    try:
        with make_engine(objective_of(s, config), xp, workers, s.precision) as engine:
            start, note = None, ()
            if resume and folder.last.exists():
                state = load_state(folder.last, s, config, schedule, xp)
                folder.cut_metrics(state.epoch)
                if state.best is not None:
                    folder.require_best()
            else:
                if resume:
                    note = (f"nothing is saved in {folder.path} yet: the run begins at step 1",)
                if s.init_from is not None:
                    known = stored_sha256(out, "init_sha256")
                    start = read_start(s.init_from, config, dataset.classes, known)
                    hashes["init_sha256"] = start.sha256
                state = begin_state(s, config, xp, start)
                folder.cut_metrics(0)
                hashes = {name: value for name, value in hashes.items() if value}
                about = describe(s, config, data_dir, engine.workers, without_reason(place))
                folder.write_config(about | hashes)
            data = on_device(dataset, xp)
            trained = [name for name in state.params if name not in frozen]
            limits = s.clip_grad or inf, s.ema
            engine.hold(state.params, state.optimizer, state.ema, trained, *limits)
            images = [steps * schedule.batch_size for steps in (schedule.total_steps, state.step)]
            shown = report(*images, schedule.epochs, quiet)
            run = Run(s, schedule, dataset, data, engine, folder, frozen, shown)
            lines = [*note, *_introduction(run, state), *([start.text] if start else []), place]
            if state.step:
                lines.append(f"resumed after step {state.step} of {schedule.total_steps}")
                lines.extend(_other_arithmetic(folder))
            yield run, state, lines
    finally:
        folder.close()


def _other_arithmetic(folder):
    """A line where the libraries or the processor are not those with which the run began."""
    before, now = (folder.config() or {}).get("versions"), arithmetic()
    if isinstance(before, dict):
        known = {name: before[name] for name in now if name in before}
        changes = [
            f"{name} {now[name]} in place of {old}"
            for name, old in known.items()
            if old != now[name]
        ]
        if changes:
            yield f"from here on the last digits may differ: {', '.join(changes)}"


def _introduction(run, state):
    """What is trained, on what, for how long and where it is kept."""
    dataset, schedule, workers = run.dataset, run.schedule, run.engine.workers
    parameters = sum(p.size for p in state.params.values())
    asked, most = run.settings.batch_size, schedule.batch_size
    smaller = f"there are fewer images than --batch-size {asked}: a step takes all {most}"
    on_workers = f" on {workers} worker{'s' * (workers > 1)}" if workers else ""  # none: a GPU
    return (
        f"{run.settings.model}, {parameters:,} parameters, on {dataset.name}: "
        f"{len(dataset.train.labels):,} images to train, {len(dataset.val.labels):,} "
        f"to validate, {len(dataset.classes)} classes",
        f"{schedule.total_steps:,} step{'s' * (schedule.total_steps > 1)} of "
        f"{schedule.batch_size} images in {schedule.epochs} "
        f"epoch{'s' * (schedule.epochs > 1)}{on_workers}, kept in {run.folder.path}",
        *([smaller] if asked > most else []),
    )
