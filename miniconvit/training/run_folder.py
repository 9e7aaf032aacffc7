"""The folder of one training run: which files it has, and who may write them."""

import json
import os
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from itertools import chain, count, islice
from pathlib import Path
from platform import python_version
from zlib import crc32

from ..checkpoints.checkpoint import BEST, LAST, load_checkpoint
from ..config import is_number
from ..errors import UserError
from ..neighbours.models import config_to_dict
from ..system import arithmetic, cannot_write, parse_json, read_json, write_file

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are then not told apart
    fcntl = None

CONFIG, LOG = "config.json", "log.txt"
TIMINGS = {"images_per_second", "seconds"}
NUMBERS = {"epoch", "step", "train_loss", "train_top1", "val_loss", "val_top1", "lr"} | TIMINGS
READINGS = ("nonlocality", "gates", "strengths", "centre_norms")
"""What a row of metrics.jsonl holds."""
CHECKSUM = "crc32"
"""What each line has beside, so that a changed digit is noticed; older files are without."""
MOST_LISTS = 2**20  # in all rows: a list takes twenty times the memory of its text
BEFORE_CONFIG = {LOG, CONFIG + ".partial"}  # what a run that dies at once leaves behind


def default_out(settings, resume: bool = False) -> Path:
    """runs/DATA-MODEL-seedN, or with -2, -3, ... after it: the first of these folders that does not
    exist; with resume=True the last that does, if any."""
    name = f"{settings.data}-{settings.model}-seed{settings.seed}"
    last = None
    for candidate in chain([name], (f"{name}-{number}" for number in count(2))):
        path = Path("runs") / candidate
        if not path.exists():
            return last if resume and last else path
        last = path


def describe(settings, config, data_dir, workers, place):
    """For config.json: what decides a run, and where it was made."""
    return {
        "settings": asdict(settings),
        "model": config_to_dict(config),
        "data_dir": None if data_dir is None else str(Path(data_dir).expanduser().absolute()),
        "place": place,
        "workers": workers,
        "versions": {"python": python_version()} | arithmetic(),
    }


def _is_row(row, epoch):
    """Whether a dict is what finish_epoch writes: numbers, and lists of a list of numbers a layer,
    with None for what a head has not."""
    numbers = {name: value for name, value in row.items() if name not in READINGS}
    lists = [row[name] for name in READINGS if name in row]
    return (
        set(numbers) == NUMBERS
        and len(lists) in (0, len(READINGS))
        and all(map(is_number, numbers.values()))
        and type(row["epoch"]) is type(row["step"]) is int
        and row["epoch"] == epoch
        and all(0 <= row[name] <= 1 for name in ("train_top1", "val_top1"))
        and all(isinstance(layers, list) for layers in lists)
        and all(isinstance(heads, list) for layers in lists for heads in layers)
        and all(x is None or is_number(x) for layers in lists for heads in layers for x in heads)
    )


def _checksum(row):
    """Of all that two equal runs have alike: not of the timings."""
    return crc32(json.dumps({key: row[key] for key in row if key not in TIMINGS}).encode())


class RunFolder:
    """config.json, metrics.jsonl, last.safetensors, best.safetensors, log.txt and curves.png.

    Reading needs nothing more; writing needs open(), which locks the folder until close().
    """

    def __init__(self, path):
        self.path = Path(path)
        self.last, self.best = self.path / LAST, self.path / BEST
        self.metrics, self.curves = self.path / "metrics.jsonl", self.path / "curves.png"
        self._log = None

    def config(self):
        """What config.json says, or None where no run has begun here."""
        return read_json(self.path / CONFIG, "choose another --out")

    def check(self, resume):
        """Raises UserError where a run may not begin, or with resume=True not go on, here."""
        for file in (self.last, self.best, self.metrics, self.path / LOG):
            if file.exists() and not file.is_file():
                raise UserError(f"{file} is no file: take it away, or choose another --out")
        if self.config() is not None:
            if not resume:
                raise UserError(
                    f"{self.path} holds a run already: continue it with --resume, "
                    "or choose another folder with --out"
                )
            return
        try:
            names = {file.name for file in self.path.iterdir()}
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise UserError(f"{self.path} is not a folder: choose another --out") from None
        if names - BEFORE_CONFIG:
            raise UserError(
                f"{self.path} is not empty and holds no run: choose a new folder with --out"
            )

    def open(self, resume):
        """Makes the folder, locks it, checks it and clears what a kill left half-written.

        Raises UserError where another process trains here or the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._log = open(self.path / LOG, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(cannot_write(self.path, error)) from error
        try:
            self._lock()
            self.check(resume)
            for file in self.path.glob("*.partial"):
                file.unlink()
        except BaseException:
            self.close()
            raise

    def close(self):
        """Ends the log and with it the lock."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _lock(self):
        if fcntl is None:
            return
        try:
            fcntl.flock(self._log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training in {self.path}: wait for it, stop it, "
                "or choose another folder with --out"
            ) from None
        except OSError:
            pass  # a file system without locks

    def is_training(self):
        """Whether a process trains here now, as far as the file system has locks."""
        if fcntl is not None:
            with suppress(FileNotFoundError), open(self.path / LOG, "rb") as log:
                try:
                    fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
                except OSError:
                    pass  # a file system without locks
        return False

    def write_config(self, values):
        """Writes config.json, which makes the folder a run."""
        write_file(self.path / CONFIG, json.dumps(values, indent=2).encode() + b"\n")

    def log(self, text):
        """Appends lines to log.txt, each with the time of day."""
        now = datetime.now().isoformat(sep=" ", timespec="seconds")
        self._append(self._log, "".join(f"{now}  {line}\n" for line in text.splitlines()))

    def append_metrics(self, row):
        """Adds one epoch's row to metrics.jsonl, on the disk when this returns."""
        try:
            with open(self.metrics, "ab", buffering=0) as file:
                line = row | {CHECKSUM: _checksum(row)}
                self._append(file, json.dumps(line, allow_nan=False) + "\n")
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(cannot_write(self.metrics, error)) from error

    def finished_epochs(self):
        """The rows of metrics.jsonl so far, as many as are whole."""
        try:
            return self._rows()
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.metrics} is damaged: {error}; give a checkpoint instead"
            ) from error

    def rows(self, count):
        """The first `count` rows of metrics.jsonl; what stands after them may be half a line.

        Raises UserError where there are fewer.
        """
        with suppress(OSError, ValueError):
            rows = self._rows(count) if count else []
            if len(rows) == count:
                return rows
        raise UserError(
            f"{self.metrics} is damaged: {count} whole lines were expected, one for each epoch "
            "that last.safetensors knows; start again in another folder with --out"
        )

    def _rows(self, count=None):
        """All rows, or the first `count`, of metrics.jsonl, without what is half a line. Raises
        ValueError for lines that are no rows."""
        rows, lists = [], 0
        if self.metrics.exists() and not self.metrics.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        with open(self.metrics, "rb") as file:
            for line in islice(file, count):
                if not line.endswith(b"\n"):
                    break
                lists += line.count(b"[")
                rows.append(row := parse_json(line))
                is_whole = row.pop(CHECKSUM, None) in (None, _checksum(row))
                if not is_whole or not _is_row(row, len(rows)) or lists > MOST_LISTS:
                    raise ValueError(f"line {len(rows)} is no row of epoch {len(rows)}")
        return rows

    def require_best(self):
        """Raises UserError where best.safetensors, with which the run may end, is not whole."""
        try:
            load_checkpoint(self.best)
        except UserError as error:
            raise UserError(
                f"{self.best} is missing or damaged: put it back from a copy, or train on in a new "
                f"run with --init-from {self.last} and another --out"
            ) from error

    def cut_metrics(self, count):
        """Takes from metrics.jsonl what the checkpoint does not know: all but `count` rows."""
        self.rows(count)
        if self.metrics.exists():
            lines = self.metrics.read_bytes().split(b"\n")
            write_file(self.metrics, b"".join(line + b"\n" for line in lines[:count]))

    def _append(self, file, text):
        try:
            content = text.encode()
            if file.write(content) != len(content):
                raise OSError("the disk is full")
        except OSError as error:
            raise UserError(cannot_write(file.name, error)) from error


class UnwrittenFolder(RunFolder):
    """The folder of a run for those of its processes that write nothing."""

    def log(self, text):
        """Nothing: another process does."""
