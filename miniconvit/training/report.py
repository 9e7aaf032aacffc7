"""What a training run shows: a progress bar, a line per epoch, a summary, curves."""

import errno
import re
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from shutil import get_terminal_size
from textwrap import wrap

from tqdm import tqdm

from ..analysis import style

COLUMNS = "epoch  train loss  train acc  val loss  val acc       lr  images/s     time"
BAR = "{desc}, {remaining} left |{bar}| {percentage:.0f} %, {rate_noinv_fmt}"
"""What matters most comes first: where the line is too long, its end is cut off."""
PLOT_ROWS, PLOT_COLUMNS = 8, 60


class Report:
    """Lines on standard output, and a progress bar where standard error is a terminal.

    total, done: images of the whole run and those trained on before. quiet: nothing at all.
    """

    def __init__(self, total, done, epochs, quiet):
        self.quiet, self.epochs = quiet, epochs
        hidden = True if quiet else None  # None: tqdm shows itself on terminals only
        self._bar = tqdm(
            total=total, initial=done, disable=hidden, unit=" img", bar_format=BAR, leave=False
        )

    def lines(self, *texts):
        """Prints lines above the bar."""
        if not self.quiet:
            with _terminal_may_be_gone():
                for text in texts:
                    self._bar.write(folded(text), file=sys.stdout)
                sys.stdout.flush()

    def epoch(self, row):
        """Prints a row of metrics.jsonl."""
        self.lines(epoch_line(row))

    def step(self, images, epoch, loss, accuracy):
        """Moves the bar on by one step; loss and accuracy (0 to 1) are the epoch's so far."""
        self._bar.set_description_str(
            f"epoch {epoch}/{self.epochs}, loss {loss:.4f}, acc {100 * accuracy:.1f} %",
            refresh=False,
        )
        with _terminal_may_be_gone():
            self._bar.update(images)

    def close(self):
        """Takes the bar away."""
        with _terminal_may_be_gone():
            self._bar.close()


@contextmanager
def _terminal_may_be_gone():
    """While it lasts, a terminal that was closed costs its lines and no run."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


def epoch_line(row):
    """One row of metrics.jsonl as a line under COLUMNS."""
    speed = row["images_per_second"]  # 0 where a resume had no step left to time
    per_second = f"{speed:.0f}" if speed else "-"
    return (
        f"{row['epoch']:5d}  {row['train_loss']:10.4f}  {100 * row['train_top1']:7.1f} %"
        f"  {row['val_loss']:8.4f}  {100 * row['val_top1']:5.1f} %  {row['lr']:7.1e}"
        f"  {per_second:>8}  {duration(row['seconds']):>7}"
    )


def duration(seconds):
    """4.2 s, 1:05 min or 2:03:04 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def table(rows):
    """Lines of two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(folded(f"{name:<{width}}   {value}", width + 3) for name, value in rows)


def folded(text, indent=0):
    """The text as it is or, for a terminal, its long lines folded between words.

    What follows begins below the line's own beginning, or `indent` further to the right.
    """
    if not sys.stdout.isatty():
        return text
    width, lines = get_terminal_size().columns, []
    for line in text.split("\n"):
        begin = len(re.match(r" *(- )?", line)[0]) + indent
        whole = {"break_long_words": False, "break_on_hyphens": False}  # paths, names of files
        lines += wrap(line, width, subsequent_indent=" " * begin, **whole) or [line]
    return "\n".join(lines)


def draw_curves(rows, path):
    """A picture of losses and accuracies by epoch. False where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return False
    with style.look():
        figure, ((left, right),) = style.new_figure(1, 2, height=2.8)
        epochs = [row["epoch"] for row in rows]
        for axis, name, scale in ((left, "loss", 1), (right, "top1", 100)):
            for split, line, color in (("train", "o--", style.TRAIN), ("val", "o-", style.VAL)):
                values = [scale * row[f"{split}_{name}"] for row in rows]
                axis.plot(epochs, values, line, color=color, label=split)
            axis.set_xlabel("epoch")
            style.whole_numbers(axis)
            axis.legend()
        left.set_ylabel("loss")
        right.set_ylabel("accuracy (%)")
        style.save(figure, path, style.SCREEN)
    return True


def text_curve(values, encoding="utf-8"):
    """Accuracies (0 to 1), one for each epoch, as columns of characters under a title."""
    step = -(-len(values) // PLOT_COLUMNS)
    first = (len(values) - 1) % step  # so that the last epoch is shown
    shown = values[first::step]
    wide = max(1, min(3, PLOT_COLUMNS // len(shown)))
    marks = _marks(encoding)
    lines = ["validation accuracy"]
    for row in reversed(range(PLOT_ROWS)):
        share = (100 * (row + 1)) // PLOT_ROWS
        label = f"{share:3d} %" if (row + 1) % (PLOT_ROWS // 4) == 0 else ""
        levels = [round((value * PLOT_ROWS - row) * (len(marks) - 1)) for value in shown]
        cells = [marks[max(0, min(level, len(marks) - 1))] * wide for level in levels]
        lines.append(f"{label:>6} |{''.join(cells)}".rstrip())
    last = str(len(values)) if len(shown) > 1 else ""
    lines.append("       +" + "-" * (wide * len(shown)))
    lines.append(f"        {f'epoch {first + 1}':<{max(10, wide * len(shown) - len(last))}}{last}")
    return "\n".join(lines)


def _marks(encoding):
    """Characters from empty to full, those that the terminal can show."""
    blocks = " ▁▂▃▄▅▆▇█"
    try:
        blocks.encode(encoding)
    except UnicodeEncodeError:
        return " .:#"
    return blocks
