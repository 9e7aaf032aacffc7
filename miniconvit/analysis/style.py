"""One style for every picture: a colour for each meaning, sizes, maps, scales and the query's mark.

matplotlib is imported where a picture is drawn, and its settings hold inside look() alone.
"""

import io
from contextlib import contextmanager
from importlib.util import find_spec

from ..errors import UserError
from ..system import write_file

WIDTH = 7.0  # inches: a page's text
PRINT, SCREEN = 300, 150  # dots per inch

# Okabe and Ito's colours, which all eyes tell apart, with a darker purple.
BLUE, VERMILION, PURPLE, GREEN = "#0072B2", "#D55E00", "#AA4499", "#009E73"
ORANGE, SKY, GREY, BLACK = "#E69F00", "#56B4E9", "#777777", "#222222"
CONTENT, POSITION, GATE = BLUE, VERMILION, PURPLE
CONVIT, VIT = GREEN, ORANGE
TRAIN, VAL = GREY, BLACK
MAPS = {  # white is nothing; the last colour is the darkest
    "content": ("white", CONTENT, "#002B44"),
    "position": ("white", POSITION, "#4A1E00"),
    "mixture": ("white", GATE, "#3D1236"),
}
_SETTINGS = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "0.88",
    "grid.linewidth": 0.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "errorbar.capsize": 3,
    "image.interpolation": "nearest",
}


def require_matplotlib():
    """Raises UserError, with the line that installs it, where matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise UserError("pictures need matplotlib, which is missing: pip install matplotlib")


@contextmanager
def look():
    """Inside, matplotlib draws in this style. It serves as `with look():` and as `@look()`.

    Raises UserError where matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib import style

    with style.context(_SETTINGS, after_reset=True):
        yield


def new_figure(rows, columns, height, width=WIDTH, **options):
    """(figure, axes (rows, columns)), sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure, path, dpi=PRINT):
    """Writes the figure as a PNG file."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    write_file(path, content.getvalue())


def layer_name(index):
    """Layers are counted from 1 for people: layer_name(0) is "layer 1"."""
    return f"layer {index + 1}"


def head_name(index):
    """Heads are counted from 1 for people: head_name(0) is "head 1"."""
    return f"head {index + 1}"


def shade(index, count):
    """A colour of viridis without its palest end, for one of count layers or heads."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.88 * index / max(count - 1, 1))


def whole_numbers(axis):
    """Few ticks on the x axis, at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))


def draw_picture(axis, picture, grid, query=None):
    """An image (height, width, 1 or 3), 0 to 1, on axes that count patches of grid (rows, cols)."""
    rows, cols = grid
    picture = picture[..., 0] if picture.shape[-1] == 1 else picture
    extent = (-0.5, cols - 0.5, rows - 0.5, -0.5)
    axis.imshow(picture, extent=extent, cmap="gray", vmin=0, vmax=1)
    _finish_map(axis, query)


def draw_map(axis, attention, kind, top, query=None):
    """A map (rows, cols) from 0 to top, in the colours of its kind, a key of MAPS.

    The scale is that of square roots, so that little attention shows too. Returns the image.
    """
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    colors = LinearSegmentedColormap.from_list(kind, MAPS[kind])
    shown = axis.imshow(attention, cmap=colors, norm=PowerNorm(0.5, 0.0, top))
    _finish_map(axis, query)
    return shown


def mark_query(axis, query):
    """A black frame with a white border around the query's patch, (row, col)."""
    from matplotlib.patches import Rectangle

    corner = query[1] - 0.5, query[0] - 0.5
    for color, width in (("white", 2.4), ("black", 1.1)):
        frame = Rectangle(corner, 1, 1, fill=False, edgecolor=color, linewidth=width, zorder=3)
        axis.add_patch(frame).set_clip_on(False)


def mark_centre(axis, col, row):
    """A cross at the centre of a head's position attention, a point in patches."""
    for color, size, width in (("white", 6.5, 2.6), ("black", 5.0, 1.0)):
        axis.plot(col, row, "+", color=color, markersize=size, markeredgewidth=width, zorder=4,
                  scalex=False, scaley=False)  # fmt: skip


def color_bar(figure, axes, shown, label):
    """The scale of a map, to the right of the axes that it holds for."""
    bar = figure.colorbar(shown, ax=axes, fraction=0.05, pad=0.015, aspect=18)
    bar.set_label(label, fontsize=7)
    label_bar(bar)


def label_bar(bar):
    """Round numbers at a map's scale, as many as there is room for."""
    ticks = [0]
    for tick in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1):
        if tick <= bar.norm.vmax and bar.norm(tick) - bar.norm(ticks[-1]) > 0.18:
            ticks.append(tick)
    bar.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    bar.outline.set_linewidth(0.5)


def _finish_map(axis, query):
    axis.grid(False)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(visible=True, color="0.7", linewidth=0.5)
    if query is not None:
        mark_query(axis, query)
