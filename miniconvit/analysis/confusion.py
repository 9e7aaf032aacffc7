"""What a model takes for what: accuracy by class, confusions, mistakes, and their files."""

import csv
import io
import warnings
from dataclasses import dataclass

import numpy as np

from ..data.preview import draw_sheet
from ..errors import UserError, printable, shortened
from ..system import write_file
from . import style

FILES = ("classes.csv", "confusion.csv", "mistakes.csv", "confusion.png", "mistakes.png")
CONFUSIONS = 20  # pairs of classes that are listed, at most
ON_THE_SHEET = 40  # mistakes
NAMED, COUNTED = 30, 15  # classes that a picture has room to name, and to count in its cells


@dataclass(frozen=True)
class Answers:
    """What a model said to n images: the labels, its most probable classes and their probabilities,
    (n,) each; classes: the names by label."""

    classes: tuple[str, ...]
    labels: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray

    def by_class(self):
        """A dict for each class, in JSON types: "class", "images", "right", "accuracy" (None
        without images), "taken_for" (what it is most often taken for, the first of equals, or
        None) and "taken" (how often)."""
        images = np.bincount(self.labels, minlength=len(self.classes)).tolist()
        rows = [
            {
                "class": name,
                "images": n,
                "right": 0,
                "accuracy": None,
                "taken_for": None,
                "taken": 0,
            }
            for name, n in zip(self.classes, images, strict=True)
        ]
        for label, predicted, count in self._pairs():
            row = rows[label]
            if label == predicted:
                row["right"] = count
            elif count > row["taken"]:
                row |= {"taken_for": self.classes[predicted], "taken": count}
        for row in rows:
            if row["images"]:
                row["accuracy"] = row["right"] / row["images"]
        return rows

    def confusions(self):
        """The most frequent mistakes, as dicts of "class", "taken_for" and "images"."""
        wrong = [pair for pair in self._pairs() if pair[0] != pair[1]]
        wrong.sort(key=lambda pair: -pair[2])
        return [
            {"class": self.classes[label], "taken_for": self.classes[predicted], "images": count}
            for label, predicted, count in wrong[:CONFUSIONS]
        ]

    def mistakes(self):
        """Indices of the images that were taken for another class, the surest mistake first."""
        wrong = np.flatnonzero(self.labels != self.predicted)
        return wrong[np.argsort(-self.probability[wrong], kind="stable")]

    def matrix(self):
        """How many images of each class (row) were taken for each (column)."""
        found = np.zeros((len(self.classes),) * 2, np.int64)
        np.add.at(found, (self.labels, self.predicted), 1)
        return found

    def _pairs(self):
        """[(label, predicted, how often)] of the pairs that occur, in the order of the classes."""
        pairs, counts = np.unique(
            np.stack([self.labels, self.predicted]), axis=1, return_counts=True
        )
        return list(zip(*pairs.tolist(), counts.tolist(), strict=True))


def refuse_old_files(out):
    """Raises UserError where the folder out holds one of FILES."""
    for name in FILES:
        if (out / name).exists():
            raise UserError(f"{out / name} exists: choose another --out, or remove it first")


def write_answers(answers, images, out):
    """Writes FILES into the folder out. Returns (names of those written, notes on the others).

    images: of the split, as Images. Pictures that need what is not installed are left out.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows, wrong, names = answers.by_class(), answers.mistakes(), answers.classes
    _write_csv(out / "classes.csv", list(rows[0]), (row.values() for row in rows))
    counts = zip(names, answers.matrix().tolist(), strict=True)
    _write_csv(out / "confusion.csv", ["class", *names], ([name, *row] for name, row in counts))
    paths = getattr(images, "paths", None)
    head = ["index" if paths is None else "file", "class", "taken_for", "probability"]
    _write_csv(out / "mistakes.csv", head, (
        [
            index if paths is None else paths[index],
            names[answers.labels[index]],
            names[answers.predicted[index]],
            f"{answers.probability[index]:.6f}",
        ]
        for index in wrong.tolist()
    ))  # fmt: skip
    written, notes = list(FILES[:3]), []
    drawings = {"confusion.png": lambda path: draw_confusion(answers, path)}
    if len(wrong):
        drawings["mistakes.png"] = lambda path: draw_mistakes(answers, images, path)
    for name, draw in drawings.items():
        try:
            draw(out / name)
            written.append(name)
        except UserError as error:
            notes.append(f"no {name}: {error}")
    return written, notes


def _write_csv(path, head, rows):
    text = io.StringIO()
    csv.writer(text).writerows([head, *rows])
    write_file(path, text.getvalue().encode(errors="surrogateescape"))


def draw_mistakes(answers, images, path):
    """A contact sheet of the surest mistakes."""
    wrong = answers.mistakes()
    shown = wrong[:ON_THE_SHEET]
    names = [printable(name) for name in answers.classes]
    captions = [
        f"{names[answers.labels[index]]}\n"
        f"{100 * answers.probability[index]:.0f} % {names[answers.predicted[index]]}"
        for index in shown
    ]
    note = f"{len(wrong):,} of {len(answers.labels):,} images are taken for another class"
    note += f", the {len(shown)} surest of these: " if len(wrong) > len(shown) else ": "
    draw_sheet(f"{note}what it is, and what the model says", images[shown], captions, path)


@style.look()
def draw_confusion(answers, path):
    """The confusion matrix as a picture: of each class's images, the share taken for each class."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    counts, size = answers.matrix(), len(answers.classes)
    total = counts.sum(axis=1, keepdims=True)
    shares = np.ma.masked_array(
        counts / np.maximum(total, 1), np.broadcast_to(total == 0, counts.shape)
    )
    colors = LinearSegmentedColormap.from_list("confusion", ("white", style.BLUE, "#002B44"))
    figure, ((axis,),) = style.new_figure(1, 1, height=6.0)
    axis.set_facecolor("0.9")  # seen where nothing is drawn
    shown = axis.imshow(shares, cmap=colors, norm=PowerNorm(0.5, 0.0, 1.0))
    axis.grid(False)
    axis.set(xlabel="what the model says", ylabel="what it is")
    if size <= NAMED:
        names = [shortened(name, 28) for name in answers.classes]
        axis.set_xticks(range(size), names, rotation=90, parse_math=False)
        axis.set_yticks(range(size), names, parse_math=False)
    if size <= COUNTED:
        for row, col in zip(*np.nonzero(counts), strict=True):
            color = "white" if shares[row, col] > 0.2 else style.BLACK
            axis.text(col, row, f"{counts[row, col]:,}", ha="center", va="center", fontsize=6,
                      color=color)  # fmt: skip
    style.label_bar(bar := figure.colorbar(shown, fraction=0.05, pad=0.015, aspect=30))
    bar.set_label("share of the class")
    if not total.all():
        figure.supxlabel("grey: no image of this class", fontsize=7)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a script that the font has not
        style.save(figure, path, style.SCREEN)
