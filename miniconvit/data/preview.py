"""Contact sheets: what the training sees of a data set's images, and any images with captions."""

import io

import numpy as np

from ..errors import printable
from ..system import write_file
from . import PRESETS, draw_mix, erase, mix_images, normalize
from .images import require_pillow

ROWS, COPIES = 8, 7
COLUMNS = 8
"""Of a sheet of any images."""
CELL = 96  # pixels on the sheet, at least, for an image's width
GAP, LINE = 8, 14
MIXES = {"mixup": (0.8, 0.0), "cutmix": (0.0, 1.0)}
"""Column to the alphas of mixup and CutMix: the official recipe's."""


def draw_preview(dataset, preset, path, seed=0):
    """Writes a PNG: one training image a row, its augmented copies, and it mixed with a partner.

    dataset: a Dataset; preset: a name of PRESETS. Raises UserError where Pillow is missing.
    """
    require_pillow("a contact sheet")
    places = _places(dataset.train.labels)
    images = dataset.train.images[places]
    names = [dataset.classes[label] for label in dataset.train.labels[places]]
    columns = [("original", images, names)]
    for copy in range(COPIES):
        seen = _seen(dataset, places, seed, preset, copy)
        columns.append((f"copy {copy + 1}", _shown(dataset, seen), [""] * len(places)))
    seen = _seen(dataset, places, seed, preset, COPIES)
    for title, alphas in MIXES.items():
        columns.append((title, *_mixed(dataset, seen, names, seed, alphas)))
    note = f"{dataset.name}, --augment {preset}: {PRESETS[preset].summary}"
    _write_sheet(note, columns, path)


def draw_sheet(note, images, captions, path):
    """Writes a PNG of uint8 images (n, 3, H, W), n >= 1, row by row, each over its caption, which
    may have two lines. Raises UserError where Pillow is missing."""
    require_pillow("a contact sheet")
    columns = [("", images[i::COLUMNS], captions[i::COLUMNS]) for i in range(COLUMNS)]
    _write_sheet(note, columns, path)


def _places(labels):
    """The first image of each of ROWS classes, or of as many as there are and then the next."""
    first = np.unique(labels, return_index=True)[1]
    others = np.setdiff1d(np.arange(min(len(labels), 2 * ROWS)), first)
    return np.concatenate([first, others])[:ROWS]


def _seen(dataset, places, seed, preset, copy):
    """The images as the first epoch would load this copy of them, normalised."""
    which = places, seed, 0, preset, copy
    pixels = dataset.train.images.training_view(*which)
    return erase(normalize(pixels, dataset.mean, dataset.std), *which)


def _shown(dataset, normalised):
    """Back to uint8."""
    mean, std = (np.asarray(x, "float32")[:, None, None] for x in (dataset.mean, dataset.std))
    return np.clip(255 * (normalised * std + mean) + 0.5, 0, 255).astype(np.uint8)


def _mixed(dataset, seen, names, seed, alphas):
    """Each image with its partner, by the shares of as many steps: (images, captions)."""
    images, captions = [], []
    for row, partner in enumerate(reversed(range(len(seen)))):
        mix = draw_mix(*alphas, seed, row, seen.shape[2:])
        one = mix_images(seen[row : row + 1].copy(), seen[partner : partner + 1], mix)
        images.append(_shown(dataset, one)[0])
        captions.append(f"{100 * (1 - mix.share):.0f} % {names[partner]}")
    return np.array(images), captions


def _write_sheet(note, columns, path):
    """Writes a PNG of columns of (title, uint8 images (n, 3, H, W), captions)."""
    from PIL import Image, ImageDraw, ImageFont

    rows, _, height, width = columns[0][1].shape
    lines = max(caption.count("\n") + 1 for _, _, captions in columns for caption in captions)
    scale = -(-CELL // width)
    wide, tall = width * scale + GAP, height * scale + GAP + LINE * lines
    head = 2 * LINE + GAP
    sheet = Image.new("RGB", (GAP + wide * len(columns), head + tall * rows), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    pen.text((GAP, GAP // 2), note, "black", font)
    for column, (title, images, captions) in enumerate(columns):
        x = GAP + column * wide
        pen.text((x, GAP // 2 + LINE), title, "black", font)
        for row, (pixels, caption) in enumerate(zip(images, captions, strict=True)):
            y = head + row * tall
            picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            size = (width * scale, height * scale)
            sheet.paste(picture.resize(size, Image.Resampling.NEAREST), (x, y))
            for line, text in enumerate(caption.split("\n")):
                place = x, y + height * scale + line * LINE
                pen.text(place, _fitting(printable(text), font, wide - GAP), "black", font)
    picture = io.BytesIO()
    sheet.save(picture, format="png")
    write_file(path, picture.getvalue())


def _fitting(text, font, width):
    """text, with dots in its middle where it is longer than so many pixels."""
    if font.getlength(text) <= width:
        return text
    first = last = text
    while font.getlength(f"{first}...{last}") > width:
        first, last = (first, last[1:]) if len(last) > len(first) else (first[:-1], last)
    return f"{first.rstrip()}...{last.lstrip()}"
