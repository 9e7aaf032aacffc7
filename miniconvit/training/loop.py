"""Training: the loop of a run, how it stops, and how it goes on to the bit."""

import os
import signal
import threading
import time
import warnings
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain, count
from math import inf, isfinite, nan
from pathlib import Path
from platform import python_version

import numpy as np

from ..analysis.readings import reading_images, readings
from ..arrays import to_cpu, to_device
from ..checkpoints.checkpoint import load_checkpoint, not_finite, save_checkpoint
from ..checkpoints.weights import read_start
from ..config import is_count, is_number
from ..data import (
    BrokenImage,
    ImageFiles,
    Split,
    draw_mix,
    epoch_order,
    erase,
    feed,
    fingerprint,
    load_dataset,
    mix_images,
    mix_targets,
    normalize,
    training_images,
)
from ..engine import make_engine
from ..engine.cuda import resolve_device
from ..engine.processes import LostWorker
from ..errors import UserError
from ..layers import cross_entropy_forward
from ..optim import AdamW, clip_grad_norm, update_average, warmup_cosine
from ..system import available_threads
from .freeze import frozen_names, initial_params
from .report import COLUMNS, Report, epoch_line
from .run_folder import RunFolder
from .settings import Settings, refuse_difference, stored_data_dir, stored_settings, stored_sha256

SAVE_SECONDS = 60.0
EVALUATION_CHUNK = 1024  # images; a signal is answered after so many
FILES_CHUNK = 128  # the same where they are decoded, several chunks ahead


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and has saved itself. signal: the signal's number."""

    def __init__(self, signum, step):
        super().__init__(f"stopped by {signal.Signals(signum).name} after step {step}")
        self.signal, self.step = signum, step


class Diverged(ArithmeticError):
    """The loss, a gradient or a parameter is not finite; the last good checkpoint stays."""


def default_out(settings, resume=False):
    """runs/DATA-MODEL-seedN, or with -2, -3, ... after it: the first of these folders that does not
    exist; with resume=True the last that does, if any."""
    name = f"{settings.data}-{settings.model}-seed{settings.seed}"
    last = None
    for candidate in chain([name], (f"{name}-{number}" for number in count(2))):
        path = Path("runs") / candidate
        if not path.exists():
            return last if resume and last else path
        last = path


@dataclass(frozen=True)
class Result:
    """What a finished run has reached. rows: metrics.jsonl; best: the row of best.safetensors;
    was_finished: nothing was left to do; has_test: whether the data set has a test split."""

    folder: Path
    step: int
    rows: list
    best: dict
    was_finished: bool
    has_test: bool


def train(
    settings,
    out,
    *,
    resume=False,
    data_dir=None,
    download=True,
    workers=None,
    device="cpu",
    quiet=False,
    report=Report,
):
    """Trains a model by these Settings and keeps everything in the folder `out`. Returns a Result.

    resume: goes on with the run in `out`, to the bit, or begins it where nothing was saved; a run
    that has begun downloads no data, and these lie where they lay unless data_dir says otherwise.
    quiet: prints nothing. report: shows how it goes, called with Report's arguments. Raises
    UserError, after saving where an image file cannot be decoded or a worker is killed (but in the
    middle of an update the last save is what stays); Interrupted after SIGINT or SIGTERM, when the
    step is done and saved; Diverged where the loss is not finite, which on a GPU is looked for
    every 50 steps.
    """
    folder = RunFolder(out)
    folder.check(resume)
    stored = stored_settings(out)
    if stored is not None:
        refuse_difference(stored, asdict(settings), out)
        data_dir, download = data_dir or stored_data_dir(out), False
    if workers is not None and workers < 1:
        raise UserError(f"--workers must be at least 1, not {workers}")
    xp, place = resolve_device(device)
    s = settings
    dataset = load_dataset(s.data, data_dir, download, s.subset, s.img_size, s.broken)
    fingerprints = {"data_sha256": fingerprint(dataset)}
    if stored_sha256(out, "data_sha256") not in (None, fingerprints["data_sha256"]):
        raise UserError(
            f"the image files are not those with which the run in {out} began: put back what was "
            "added, removed or renamed, or begin another run with another --out"
        )
    config = settings.model_config(dataset)
    frozen = frozen_names(config, settings.freeze)
    folder.open(resume)
    try:
        with make_engine(config, xp, workers) as engine:
            run = _Run(settings, dataset, engine, folder, frozen)
            if resume and folder.last.exists():
                run.load()
            else:
                fingerprints["init_sha256"] = run.begin(stored_sha256(out, "init_sha256"))
                folder.cut_metrics(0)
                about = _about(settings, config, data_dir, engine.workers, place)
                folder.write_config(about | {k: v for k, v in fingerprints.items() if v})
            return run.train(quiet, place, report)
    finally:
        folder.close()


def _about(settings, config, data_dir, workers, place):
    """config.json: what decides the run, and where it was made."""
    versions = {name: version(name) for name in ("numpy", "scipy", "safetensors")}
    return {
        "settings": asdict(settings),
        "model": config.to_dict(),
        "data_dir": None if data_dir is None else str(Path(data_dir).expanduser().absolute()),
        "place": place,
        "workers": workers,
        "versions": {"python": python_version()} | versions,
    }


def evaluate(engine, split, mean, std, params, between_chunks=lambda: None):
    """(loss, top-1, top-5) over a split: mean cross-entropy, and shares between 0 and 1; NaNs where
    the model's answers are not finite.

    between_chunks is called now and then, and may raise to end it.
    """
    loss, top1, top5 = 0.0, 0, 0
    dtype = next(iter(params.values())).dtype
    n, images = len(split.labels), split.images
    size = FILES_CHUNK if isinstance(images, ImageFiles) else EVALUATION_CHUNK
    chunks = [range(n)[first : first + size] for first in range(0, n, size)]
    fed = feed(lambda part: images[part.start : part.stop], chunks, _decoders(images, engine))
    with closing(fed):
        for chunk, pixels in zip(chunks, fed, strict=True):
            between_chunks()
            labels = split.labels[chunk.start : chunk.stop]

            def load(start, stop, pixels=pixels):
                return normalize(to_device(pixels(start, stop), engine.xp), mean, std, dtype)

            logits = engine.logits(load, len(labels), params).astype(np.float64)  # (n, C)
            if not np.isfinite(logits).all():
                return nan, nan, nan
            loss += float(cross_entropy_forward(logits, labels)[0]) * len(labels)
            right = logits[np.arange(len(labels)), labels]
            rank = (logits > right[:, None]).sum(axis=1)  # (n,), 0 for the best
            top1 += int((logits.argmax(axis=1) == labels).sum())
            top5 += int((rank < 5).sum())
    return loss / n, top1 / n, top5 / n


def _decoders(images, engine):
    """How many threads load images ahead of the step: files take as many as there are workers,
    arrays one, and arrays on a GPU none."""
    if isinstance(images, ImageFiles):
        return engine.workers or available_threads()
    return int(engine.xp is np)


class _Run:
    """The state of a training run and what changes it."""

    def __init__(self, settings, dataset, engine, folder, frozen):
        self.settings, self.dataset, self.engine, self.folder = settings, dataset, engine, folder
        self.frozen = frozen  # names of parameters
        n = len(dataset.train.labels)
        self.batch_size = min(settings.batch_size, n)
        self.steps_per_pass = n // self.batch_size  # a remainder waits for the next pass's order
        self.steps_per_epoch = settings.passes * self.steps_per_pass
        self.total_steps = settings.steps or settings.epochs * self.steps_per_epoch
        self.epochs = -(-self.total_steps // self.steps_per_epoch)
        self.images, self.val_images = dataset.train.images, dataset.val.images
        self.has_files = isinstance(self.images, ImageFiles)
        if not self.has_files:
            self.images, self.val_images = to_device((self.images, self.val_images), engine.xp)
        self.labels, self.mean, self.std = to_device(
            (
                dataset.train.labels,
                *(np.asarray(x, "float32") for x in (dataset.mean, dataset.std)),
            ),
            engine.xp,
        )
        self.params = initial_params(engine.config, settings.seed, settings.freeze)
        self.params = to_device(self.params, engine.xp)
        self.optimizer = AdamW(self.params, settings.lr, settings.weight_decay)
        self.ema = None
        if settings.ema is not None:
            self.ema = {name: value.copy() for name, value in self.params.items()}
        self.step, self.epoch = 0, 0  # both finished
        self.unread = []  # (step, loss, correct, norm) of the last steps
        self.sums = {"loss": 0.0, "correct": 0, "images": 0}  # of the running epoch
        self.best = None  # {"epoch", "val_top1"}
        self.stop_requests = []
        self.saved_at = self.epoch_began = time.perf_counter()
        self.trained_images, self.trained_seconds = 0, 0.0  # of this epoch in this process
        self.origin = ()  # lines that say where the parameters come from

    def begin(self, sha256):
        """Takes up the parameters that the settings begin from, whose file must have this sha256 if
        one is given. Returns the file's sha256, None where a run begins from nothing."""
        source = self.settings.init_from
        if source is None:
            return None
        start = read_start(source, self.engine.config, self.dataset.classes, sha256)
        for name, value in start.params.items():
            self.params[name][...] = to_device(value, self.engine.xp)
            if self.ema is not None:
                self.ema[name][...] = self.params[name]
        self.origin = (start.text,)
        return start.sha256

    def load(self):
        """Takes up last.safetensors. Raises UserError where it is another run's, or damaged."""
        path = self.folder.last
        checkpoint = load_checkpoint(path)
        try:
            state = checkpoint.state
            stored = Settings(**state["settings"])
            moments = checkpoint.moments["exp_avg"], checkpoint.moments["exp_avg_sq"]
            if (checkpoint.ema is None) != (stored.ema is None):
                raise KeyError("ema")
        except (TypeError, KeyError, UserError) as error:
            raise UserError(
                f"{path} is damaged, or is no checkpoint to resume from: "
                "begin again in another folder with --out"
            ) from error
        refuse_difference(stored, asdict(self.settings), self.folder.path)
        if checkpoint.config != self.engine.config:
            raise UserError(
                f"{path} holds another model than these settings and this data set give: "
                "resume with the data that the run began with"
            )
        problem = self._problem(checkpoint)
        if problem:
            raise UserError(
                f"{path} is damaged: {problem}; begin again in another folder with --out"
            )
        self.step, self.epoch = state["step"], state["epoch"]
        self.sums, self.best = state["sums"], state["best"]
        self.params, moments, self.ema = to_device(
            (checkpoint.params, moments, checkpoint.ema), self.engine.xp
        )
        self.optimizer.exp_avg, self.optimizer.exp_avg_sq = moments
        self.optimizer.step_count = self.step
        self.folder.cut_metrics(self.epoch)

    def _problem(self, checkpoint):
        """What is wrong with the numbers of a checkpoint of this run, or None."""
        step, epoch, sums, best = map(checkpoint.state.get, ("step", "epoch", "sums", "best"))
        if not (is_count(step) and is_count(epoch) and epoch <= self.epochs):
            return f"step {step} with {epoch} finished epochs is not of this run"
        first, end = (
            min(number * self.steps_per_epoch, self.total_steps) for number in (epoch, epoch + 1)
        )
        if not first <= step <= end:
            return f"step {step} with {epoch} finished epochs is not from {first} to {end}"
        if not self._are_sums(sums, (step - first) * self.batch_size):
            return f"the sums of the running epoch at step {step} are {sums}"
        if not _is_best(best, epoch):
            return f"the best of {epoch} epochs is {best}"
        dtype = next(iter(checkpoint.params.values())).dtype
        return None if dtype == "float32" else f"its tensors are {dtype}, not float32"

    def _are_sums(self, sums, images):
        return (
            isinstance(sums, dict)
            and set(sums) == set(self.sums)
            and is_number(sums["loss"])
            and is_count(sums["images"])
            and is_count(sums["correct"])
            and sums["correct"] <= sums["images"] == images
        )

    def save(self):
        """Writes last.safetensors. Raises Diverged rather than keep what is not finite."""
        self._read()
        problem = not_finite(to_cpu(self.params))
        if problem:
            raise self._diverged(problem)
        state = {"settings": asdict(self.settings), "step": self.step, "epoch": self.epoch}
        state |= {"sums": self.sums, "best": self.best}
        training = {"optimizer": self.optimizer, "ema": self.ema, "state": state}
        self._save(self.folder.last, self.params, **training)
        self.saved_at = time.perf_counter()

    @property
    def shown(self):
        """The parameters that are evaluated and become best.safetensors."""
        return self.params if self.ema is None else self.ema

    def _save(self, path, params, **training):
        dataset = self.dataset
        about = {"mean": [float(x) for x in dataset.mean], "std": [float(x) for x in dataset.std]}
        about |= {"classes": list(dataset.classes), "data": dataset.name}
        save_checkpoint(path, params, self.engine.config, **about, **training)

    def train(self, quiet, place, report):
        """The whole run from where it stands. Returns a Result."""
        was_finished = self.epoch == self.epochs
        total, done = self.total_steps * self.batch_size, self.step * self.batch_size
        self.report = report(total, done, self.epochs, quiet)
        self.engine.hold(self.params, self.optimizer)
        try:
            self._introduce(place)
            with _signals(self.stop_requests), warnings.catch_warnings():
                # An overflow is answered by Diverged, not by NumPy's warning.
                warnings.simplefilter("ignore", RuntimeWarning)
                while self.epoch < self.epochs:
                    self._train_epoch()
                    self._finish_epoch()
        except (Interrupted, Diverged, UserError) as reason:
            with suppress(UserError):  # the reason may be a full disk
                self.folder.log(str(reason))
            raise
        finally:
            self.report.close()
        rows = self.folder.rows(self.epoch)
        self.folder.log(f"finished after step {self.step}")
        best, has_test = rows[self.best["epoch"] - 1], self.dataset.test is not None
        return Result(self.folder.path, self.step, rows, best, was_finished, has_test)

    def _introduce(self, place):
        dataset, workers = self.dataset, self.engine.workers
        parameters = sum(p.size for p in self.params.values())
        self._say(
            f"{self.settings.model}, {parameters:,} parameters, on {dataset.name}: "
            f"{len(dataset.train.labels):,} images to train, {len(dataset.val.labels):,} "
            f"to validate, {len(dataset.classes)} classes",
            f"{self.total_steps:,} steps of {self.batch_size} images in {self.epochs} "
            f"epoch{'s' * (self.epochs > 1)}{_on_workers(workers)}, kept in "
            f"{self.folder.path}",
            *self.origin,
            place,
        )
        if self.step:
            self._say(f"resumed after step {self.step} of {self.total_steps}")
        if self.epoch < self.epochs:
            self.report.lines("", COLUMNS)

    def _say(self, *texts):
        for text in texts:
            self.folder.log(text)
        self.report.lines(*texts)

    def _train_epoch(self):
        """The steps of this epoch that are still to do, with a save now and then."""
        end = min((self.epoch + 1) * self.steps_per_epoch, self.total_steps)
        self.epoch_began, self.trained_images, self.trained_seconds = time.perf_counter(), 0, 0.0
        while self.step < end:
            self._train_pass(end)

    def _train_pass(self, end):
        """The steps up to `end` of this pass over the images, which has an order of its own."""
        s, number = self.settings, self.step // self.steps_per_pass
        order = epoch_order(len(self.dataset.train.labels), s.seed, number, s.repeats)
        if not self.has_files:
            order = to_device(order, self.engine.xp)
        first, size = number * self.steps_per_pass, self.batch_size
        steps = range(self.step, min(first + self.steps_per_pass, end))
        batches = [order[(step - first) * size :][:size] for step in steps]

        def view(draws):
            indices, copies = divmod(draws, s.repeats)
            return training_images(self.images, indices, s.seed, number, s.augment, copies)

        workers = _decoders(self.images, self.engine)
        with self._saving(), closing(feed(view, batches, workers)) as fed:
            for draws in batches:
                began = time.perf_counter()
                self._train_step(draws, next(fed))
                if self.step == end:
                    self._read()
                self.trained_images += self.batch_size
                self.trained_seconds += time.perf_counter() - began
                self._stop_if_asked()
                if time.perf_counter() - self.saved_at > SAVE_SECONDS:
                    self.save()

    def _train_step(self, draws, pixels):
        """One update from a batch: what the pass has drawn for it, and a function (start, stop)
        that gives a part of these images, augmented."""
        s, n, xp = self.settings, len(draws), self.engine.xp
        number = self.step // self.steps_per_pass
        mix = draw_mix(s.mixup, s.cutmix, s.seed, self.step, self.images.shape[2:])

        def part(start, stop):
            indices, copies = divmod(to_device(draws[start:stop], xp), s.repeats)
            images = normalize(to_device(pixels(start, stop), xp), self.mean, self.std)
            erase(images, indices, s.seed, number, s.augment, copies)
            return images, self.labels[indices]

        def load(start, stop):
            images, labels = part(start, stop)
            if mix is None:
                return images, labels
            others, other_labels = (x[::-1] for x in part(n - stop, n - start))
            classes = self.engine.config.num_classes
            targets = mix_targets(labels, other_labels, mix, classes, s.label_smoothing)
            return mix_images(images, others, mix), targets

        loss, correct, grads = self.engine.loss_and_grads(
            load, n, self.params, s.label_smoothing, s.seed, self.step
        )
        grads = {name: grad for name, grad in grads.items() if name not in self.frozen}
        norm = clip_grad_norm(grads, s.clip_grad or inf)
        self.unread.append((self.step, loss, correct, norm))
        if len(self.unread) == self.engine.steps_between_reads:
            self._read()
        params = {name: self.params[name] for name in grads}
        self.engine.update(self.optimizer, params, grads, self._lr(self.step))
        if self.ema is not None:
            update_average(self.ema, self.params, s.ema)
        self.step += 1

    def _read(self):
        """Adds up what the last steps have found; on a GPU this waits until they are done.

        Raises Diverged for the first of them whose loss or gradient is not finite.
        """
        unread, self.unread = self.unread, []
        numbers = self.engine.read([scalars for _, *scalars in unread])
        for (step, *_), (loss, correct, norm) in zip(unread, numbers, strict=True):
            if not isfinite(loss) or not isfinite(norm):
                finding = f"the loss is {loss:g} and the gradient's norm {norm:g}"
                raise self._diverged(finding, step)
            self.sums["loss"] += loss * self.batch_size
            self.sums["correct"] += int(correct)
            self.sums["images"] += self.batch_size
            seen = self.sums["images"]
            loss, accuracy = self.sums["loss"] / seen, self.sums["correct"] / seen
            self.report.step(self.batch_size, self.epoch + 1, loss, accuracy)

    def _lr(self, step):
        """The rate of a step: at both ends of the schedule a hundredth of the peak."""
        t, total = step / self.steps_per_epoch, self.total_steps / self.steps_per_epoch
        peak, warmup = self.settings.lr, self.settings.warmup_epochs
        return warmup_cosine(t, total, peak, warmup, start=peak / 100, minimum=peak / 100)

    def _finish_epoch(self):
        """Validates and saves. The order makes a kill harmless at any moment: until the last file
        is in place, a resume trains this epoch's end again and writes the same files."""
        val = Split(self.val_images, self.dataset.val.labels)
        with self._saving():
            val_loss, val_top1, _ = evaluate(
                self.engine, val, self.mean, self.std, self.shown, self._stop_if_asked
            )
        if not isfinite(val_loss):
            raise self._diverged(f"the validation loss is {val_loss:g}")
        self.epoch += 1
        row = self._row(val_loss, val_top1)
        if self.best is None or val_top1 > self.best["val_top1"]:
            self.best = {"epoch": self.epoch, "val_top1": val_top1}
            self._save(self.folder.best, self.shown)
        self.folder.append_metrics(row)
        self.sums = {"loss": 0.0, "correct": 0, "images": 0}
        self.save()
        self.folder.log(epoch_line(row))
        try:
            self.report.epoch(row)
        except BrokenPipeError:  # a Ctrl-C that stopped the reader too is answered first
            self._stop_if_asked()
            raise

    def _row(self, val_loss, val_top1):
        images = self.sums["images"]
        speed = self.trained_images / self.trained_seconds if self.trained_images else 0.0
        return {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": self.sums["loss"] / images,
            "train_top1": self.sums["correct"] / images,
            "val_loss": val_loss,
            "val_top1": val_top1,
            "lr": self._lr(self.step - 1),
            **readings(reading_images(self.dataset), to_cpu(self.shown), self.engine.config),
            "images_per_second": speed,
            "seconds": time.perf_counter() - self.epoch_began,
        }

    @contextmanager
    def _saving(self):
        """While it lasts, an image file that cannot be decoded or a worker that is killed costs
        nothing but a --resume; a worker killed in an update costs the steps since the last save."""
        try:
            yield
        except (BrokenImage, LostWorker) as reason:
            self.save()
            needed = "with a whole file under this name " * isinstance(reason, BrokenImage)
            raise UserError(
                f"{reason}; the run is saved after step {self.step}: {needed}it goes on by --resume"
            ) from reason

    def _stop_if_asked(self):
        if self.stop_requests:
            self.save()
            raise Interrupted(self.stop_requests[0], self.step)

    def _diverged(self, finding, step=None):
        step = self.step if step is None else step
        kept = self.folder.last
        advice = f"{kept} is the last good checkpoint" if kept.exists() else "nothing was saved yet"
        return Diverged(
            f"stopped at step {step + 1} (epoch {self.epoch + 1}): {finding}; {advice}; "
            "a smaller --lr, a longer --warmup-epochs or --clip-grad 1 may help"
        )


def _on_workers(count):
    """ " on 1 worker", or nothing where there are none, as on a GPU."""
    return f" on {count} worker{'s' * (count > 1)}" if count else ""


def _is_best(best, epoch):
    """Whether best is what a run remembers of its best epoch when so many are finished."""
    if best is None or epoch == 0:
        return best is None and epoch == 0
    return (
        isinstance(best, dict)
        and set(best) == {"epoch", "val_top1"}
        and is_count(best["epoch"], 1)
        and best["epoch"] <= epoch
        and is_number(best["val_top1"])
        and 0 <= best["val_top1"] <= 1
    )


@contextmanager
def _signals(requests):
    """While it lasts, the first SIGINT or SIGTERM is put into `requests`; a second has its usual
    effect at once. Elsewhere than in the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = {}

    def note(signum, frame):
        requests.append(signum)
        restore()
        # Not through sys.stderr, which may be in the middle of a write of its own. The reader of a
        # pipe may have been stopped by the same Ctrl-C.
        with suppress(OSError):
            os.write(2, b"\nstopping after this step, then saving (ask again to stop at once)\n")

    def restore():
        for signum, handler in usual.items():
            signal.signal(signum, handler)

    for signum in (signal.SIGINT, signal.SIGTERM):
        usual[signum] = signal.signal(signum, note)
    try:
        yield
    finally:
        restore()
