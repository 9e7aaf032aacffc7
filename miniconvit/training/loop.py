"""Training: the loop of a run, how it stops, and how it goes on to the bit."""

import time
import warnings
from collections.abc import Callable
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial, reduce
from math import inf, isfinite
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from ..analysis.readings import reading_images, readings
from ..arrays import to_cpu
from ..checkpoints.checkpoint import not_finite
from ..data import BrokenImage
from ..engine.processes import LostWorker
from ..engine.ranks import find_ranks
from ..errors import UserError
from .batches import batches
from .evaluate import evaluate
from .interrupt import Diverged, Interrupted, diverged, note_signals
from .report import COLUMNS, Report, epoch_line
from .run import Run, open_run
from .settings import Settings
from .state import TrainingState, no_sums

SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Result:
    """What a finished run has reached. rows: metrics.jsonl; best: the row of best.safetensors;
    was_finished: nothing was left to do; has_test: whether the data set has a test split."""

    folder: Path
    step: int
    rows: list[dict[str, Any]]
    best: dict[str, Any]
    was_finished: bool
    has_test: bool


def train(
    settings: Settings,
    out: str | Path,
    *,
    resume: bool = False,
    data_dir: str | Path | None = None,
    download: bool = True,
    workers: int | None = None,
    device: str = "cpu",
    quiet: bool = False,
    report: Callable[..., Report] = Report,
) -> Result:
    """Trains a model by these Settings and keeps everything in the folder `out`. Returns a Result.

    Where mpirun or srun has started several processes, all of them train it: rank 0 writes, and the
    Result is the same on all.

    resume: goes on with the run in `out`, to the bit, or begins it where nothing was saved; a run
    that has begun downloads no data, and these lie where they lay unless data_dir says otherwise.
    quiet: prints nothing. report: shows how it goes, called with Report's arguments. Raises
    UserError, after saving where an image file cannot be decoded or a worker is killed (but in the
    middle of an update the last save is what stays); Interrupted after SIGINT or SIGTERM, when the
    step is done and saved; Diverged where the loss is not finite, which on a GPU is looked for
    every 50 steps.
    """
    ranks = find_ranks()
    how = resume, data_dir, download, workers, device, quiet, report, ranks
    with ranks.guard(), open_run(settings, out, *how) as (run, state, lines):
        try:
            was_finished = state.epoch == run.schedule.epochs
            run.say(*lines)
            if not was_finished:
                run.report.lines("", COLUMNS)
            with note_signals(run.requests), warnings.catch_warnings():
                # An overflow is answered by Diverged, not by NumPy's warning.
                warnings.simplefilter("ignore", RuntimeWarning)
                while state.epoch < run.schedule.epochs:
                    train_epoch(run, state)
        except (Interrupted, Diverged, UserError) as reason:
            with suppress(UserError):  # the reason may be a full disk
                run.folder.log(str(reason))
            raise
        finally:
            run.report.close()
        rows = ranks.first(run.folder.rows, state.epoch)
        ranks.first(run.folder.log, f"finished after step {state.step}")
        best, has_test = rows[state.best["epoch"] - 1], run.dataset.test is not None
        return Result(run.folder.path, state.step, rows, best, was_finished, has_test)


def train_epoch(run: Run, state: TrainingState) -> None:
    """The steps of this epoch that are still to do, with a save now and then, and its end."""
    began = saved_at = time.perf_counter()
    _, end = run.schedule.ends(state.epoch)
    images, seconds = 0, 0.0  # of the steps alone
    with saving(run, state), closing(batches(run, state.step, end)) as loads:
        step_began = time.perf_counter()
        for load in loads:
            train_step(run, state, load)
            if state.step == end:
                count(run, state)
            images += run.schedule.batch_size
            seconds += time.perf_counter() - step_began
            if stop_if_asked(run, state, time.perf_counter() - saved_at > SAVE_SECONDS):
                saved_at = time.perf_counter()
            step_began = time.perf_counter()
    finish_epoch(run, state, images / seconds if images else 0.0, began)


def train_step(run: Run, state: TrainingState, load: Callable[[int, int], tuple]) -> None:
    """One update from a batch, of which load(start, stop) gives a part."""
    s, engine, n = run.settings, run.engine, run.schedule.batch_size
    lr = run.schedule.lr(state.step)
    if engine.takes_whole_steps:  # all of what follows, on a GPU
        state.unread.append((state.step, *engine.step(load, n, lr, s.seed, state.step)))
        state.step += 1
        if len(state.unread) == engine.steps_between_reads:
            count(run, state)
        return
    loss, correct, grads = engine.loss_and_grads(load, n, state.params, s.seed, state.step)
    grads = {name: grad for name, grad in grads.items() if name not in run.frozen}
    norm = engine.clip(grads, s.clip_grad or inf)
    state.unread.append((state.step, loss, correct, norm))
    if len(state.unread) == engine.steps_between_reads:
        count(run, state)
    params = {name: state.params[name] for name in grads}
    engine.update(state.optimizer, params, grads, lr)
    if state.ema is not None:
        engine.average(state.ema, state.params, s.ema)
    state.step += 1


def count(run: Run, state: TrainingState) -> None:
    """Adds up what the last steps have found; on a GPU this waits until they are done.

    Raises Diverged for the first of them whose loss or gradient is not finite.
    """
    unread, state.unread = state.unread, []
    numbers = run.engine.read([scalars for _, *scalars in unread])
    sums, n = state.sums, run.schedule.batch_size
    for (step, *_), (loss, correct, norm) in zip(unread, numbers, strict=True):
        if not isfinite(loss) or not isfinite(norm):
            finding = f"the loss is {loss:g} and the gradient's norm {norm:g}"
            raise diverged(finding, step, state.epoch, run.folder.last)
        sums["loss"] += loss * n
        sums["correct"] += int(correct)
        sums["images"] += n
        seen = sums["images"]
        run.report.step(n, state.epoch + 1, sums["loss"] / seen, sums["correct"] / seen)


def finish_epoch(run: Run, state: TrainingState, images_per_second: float, began: float) -> None:
    """Validates, writes a row and saves. began: when the epoch did, by perf_counter.

    The order makes a kill harmless at any moment: until the last file is in place, a resume trains
    this epoch's end again and writes the same files.
    """
    with saving(run, state):
        asked = partial(stop_if_asked, run, state)
        val_loss, val_top1, _ = evaluate(
            run.engine, run.data.val, run.data.mean, run.data.std, state.shown, asked
        )
    if not isfinite(val_loss):
        finding = f"the validation loss is {val_loss:g}"
        raise diverged(finding, state.step, state.epoch, run.folder.last)
    state.epoch += 1
    images = state.sums["images"]
    row = {
        "epoch": state.epoch,
        "step": state.step,
        "train_loss": state.sums["loss"] / images,
        "train_top1": state.sums["correct"] / images,
        "val_loss": val_loss,
        "val_top1": val_top1,
        "lr": run.schedule.lr(state.step - 1),
        **readings(reading_images(run.dataset), to_cpu(state.shown), run.config),
        "images_per_second": images_per_second,
        "seconds": time.perf_counter() - began,
    }
    if state.best is None or val_top1 > state.best["val_top1"]:
        state.best = {"epoch": state.epoch, "val_top1": val_top1}
        run.ranks.first(state.save_best, run.folder.best, run.config, run.about)
    run.ranks.first(run.folder.append_metrics, row)
    state.sums = no_sums()
    save(run, state)
    run.ranks.first(run.folder.log, epoch_line(row))
    try:
        run.report.epoch(row)
    except BrokenPipeError:  # a Ctrl-C that stopped the reader too is answered first
        if run.requests:
            raise Interrupted(run.requests[0], state.step) from None
        raise


def save(run: Run, state: TrainingState) -> None:
    """Writes last.safetensors. Raises Diverged rather than keep what is not finite, and UserError
    where the parameters of two ranks are not the same."""
    count(run, state)
    params = to_cpu(state.params)
    if problem := not_finite(params):
        raise diverged(problem, state.step, state.epoch, run.folder.last)
    run.ranks.same(
        run.ranks.size > 1 and checksum(params),
        "the parameters of {1} have become others than those of {0}, and were not saved: a machine "
        "computes wrongly, or its NumPy is another",
    )
    run.ranks.first(state.save, run.folder.last, run.settings, run.config, run.about)


@contextmanager
def saving(run, state):
    """While it lasts, an image file that cannot be decoded or a worker that is killed costs nothing
    but a --resume; a worker killed in an update costs the steps since the last save."""
    try:
        yield
    except (BrokenImage, LostWorker) as reason:
        save(run, state)
        needed = "with a whole file under this name " * isinstance(reason, BrokenImage)
        raise UserError(
            f"{reason}; the run is saved after step {state.step}: {needed}it goes on by --resume"
        ) from reason


def stop_if_asked(run: Run, state: TrainingState, is_due: bool = False) -> bool:
    """Saves where that is due by rank 0's clock, and returns whether it was; saves and raises
    Interrupted where a signal has come, to whichever rank."""
    answers = run.ranks.all((run.requests[:1], is_due))
    requests = [signum for asked, _ in answers for signum in asked]
    _, is_due = answers[0]
    if requests or is_due:
        save(run, state)
    if requests:
        raise Interrupted(requests[0], state.step)
    return is_due


def checksum(params: dict[str, Any]) -> int:
    """A number that changes with any bit of the parameters."""
    return reduce(
        lambda found, value: crc32(np.ascontiguousarray(value), found), params.values(), 0
    )
