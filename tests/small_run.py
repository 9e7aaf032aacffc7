"""The real command line on a data set so small that a whole run takes a second or two.

`python small_run.py train ...` is `miniconvit train ...` on 8x8 images. Environment: SAVE_SECONDS
is the time between saves; KILL_AT=k makes the process kill itself at its k-th disk event. These are
the moments before a flush to the disk (with the file's last bytes cut off, as a crash may leave it)
and before and after a rename. SIGNAL_AT=r:k:s sends rank r, of several that were started together,
the signal s after step k.
"""

import os
import signal
import sys
from types import SimpleNamespace

import numpy as np

import miniconvit.training.loop as training
from miniconvit.cli import data, main, train
from miniconvit.cli import eval as evaluation
from miniconvit.data import ImageArray, Split
from miniconvit.system import launched
from miniconvit.training import run

OPTIONS = {
    "--model": "convit_micro32",
    "--img-size": 8,
    "--epochs": 16,
    "--batch-size": 16,
    "--lr": 3e-3,
    "--drop-path": 0.2,
    "--augment": "crop-flip",
    "--label-smoothing": 0.1,
    "--clip-grad": 1.5,
    "--seed": 3,
}
FLAGS = [str(word) for pair in OPTIONS.items() for word in pair]


def stop_after(patch, step, signum=signal.SIGINT):
    """Sends this process the signal in the given step of the next run."""
    once = training.train_step

    def stopping(run, state, load):
        once(run, state, load)
        if state.step == step:
            signal.raise_signal(signum)

    patch.setattr(training, "train_step", stopping)


def signal_at(rank, step, signum):
    """Sends one rank a signal after the given step."""
    if launched()[1] == rank:
        stop_after(SimpleNamespace(setattr=setattr), step, signum)


def small_dataset(*_args, **_kwargs):
    """100 training images and 30 + 30 others in three classes: noise, with a class's colour."""
    rng = np.random.default_rng(5)

    def split(n):
        labels = np.arange(n) % 3
        images = rng.integers(0, 160, (n, 3, 8, 8))
        images[np.arange(n), labels] += 14
        return Split(ImageArray(images.astype(np.uint8)), labels.astype(np.int64))

    return SimpleNamespace(
        name="shapes",
        classes=("reddish", "greenish", "bluish"),
        mean=(0.36, 0.37, 0.38),
        std=(0.19, 0.20, 0.21),
        augmentation="none",
        train=split(100),
        val=split(30),
        test=split(30),
    )


def kill_at(event):
    """Makes the process kill itself at the given disk event, counted from 1."""
    events = 0
    fsync, replace = os.fsync, os.replace

    def happens():
        nonlocal events
        events += 1
        return events == event

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def killing_fsync(descriptor):
        if happens():
            size = os.fstat(descriptor).st_size
            if os.path.isfile(f"/proc/self/fd/{descriptor}"):
                os.truncate(f"/proc/self/fd/{descriptor}", size - 5)
            kill()
        fsync(descriptor)

    def killing_replace(source, target):
        if happens():
            kill()
        replace(source, target)
        if happens():
            kill()

    os.fsync, os.replace = killing_fsync, killing_replace


def use_small_data():
    """From here on every command reads the small data set, whatever it is asked for."""
    for module in (run, data, evaluation):
        module.load_dataset = small_dataset


def command(argv, save_seconds=training.SAVE_SECONDS):
    """The command line on the small data set; ends the process. It draws no picture: to load
    Matplotlib takes as long as the run."""
    use_small_data()
    train.draw_curves = lambda *_: True
    training.SAVE_SECONDS = save_seconds
    main(argv)


if __name__ == "__main__":
    if "SIGNAL_AT" in os.environ:
        signal_at(*map(int, os.environ["SIGNAL_AT"].split(":")))
    kill_at(int(os.environ.get("KILL_AT", "0")))
    command(sys.argv[1:], float(os.environ.get("SAVE_SECONDS", training.SAVE_SECONDS)))
