"""What `miniconvit inspect` finds out about a checkpoint or a run, and the files that it writes."""

import json
from dataclasses import dataclass, field

import numpy as np

from ..config import ConViTConfig
from ..data import normalize
from ..errors import UserError
from ..system import write_file
from . import pictures
from .maps import query_maps, uniform_nonlocality
from .readings import describe, plain
from .style import require_matplotlib

CLASS_TOKEN = "MHSA: without the class token's row and column, rows rescaled to sum one"


@dataclass(frozen=True)
class Inspection:
    """layers: describe's dicts, with images each with its "maps" of query_maps; picture: the first
    image as (height, width, 1 or 3) between 0 and 1, or None; history: a list of (epoch, readings),
    epoch 0 being the initialisation; images: how many were measured."""

    config: ConViTConfig
    query: tuple[int, int]
    layers: list
    images: int = 0
    picture: np.ndarray | None = None
    history: list = field(default_factory=list)

    def to_dict(self, with_maps=True):
        """Everything but the picture, in JSON types."""
        layers = []
        for layer in self.layers:
            maps = {kind: plain(values) for kind, values in layer.get("maps", {}).items()}
            layer = {key: value for key, value in layer.items() if key != "maps"}
            layers.append(layer | ({"maps": maps} if with_maps and maps else {}))
        return {
            "grid": list(self.config.grid),
            "uniform_nonlocality": plain(np.float64(uniform_nonlocality(self.config.grid))),
            "class_token": CLASS_TOKEN,
            "images": self.images,
            "query": list(self.query),
            "layers": layers,
            "history": [{"epoch": epoch} | reading for epoch, reading in self.history],
        }


def inspect(model, pixels=None, query=None, history=()):
    """The Inspection of a Checkpoint.

    pixels: uint8 images (n, in_chans, height, width) to run it on, or None, which leaves the gates,
    strengths and centres; query: (row, col) of a patch, by default the middle one. Raises UserError
    where the query lies outside the grid, and where the checkpoint does not say how images are
    normalised.
    """
    config, params = model.config, model.params
    query = _in_grid(query, config.grid)
    if pixels is None:
        return Inspection(config, query, describe(params, config), history=list(history))
    if model.mean is None or model.std is None:
        raise UserError("this checkpoint does not say how its images are normalised: use another")
    images = normalize(pixels, model.mean, model.std)
    layers = describe(params, config, images)
    for layer, maps in zip(layers, query_maps(images[0], params, config, query), strict=True):
        layer["maps"] = maps
    picture = pixels[0].transpose(1, 2, 0) / 255.0
    return Inspection(config, query, layers, len(images), picture, list(history))


def write_inspection(inspection, out, with_pictures=True):
    """Writes inspect.json and, of what there is to draw, nonlocality.png, gates.png,
    maps.png and maps-layerNN.png for each GPSA layer into the folder out. Returns their names.

    Raises UserError where the folder cannot be written, or matplotlib is missing for pictures.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(inspection.to_dict(), allow_nan=False)
    write_file(out / "inspect.json", text.encode() + b"\n")
    names = ["inspect.json"]
    if not with_pictures:
        return names
    require_matplotlib()

    def draw(function, name, *args):
        function(*args, out / name)
        names.append(name)

    config, history, query = inspection.config, inspection.history, inspection.query
    note = CLASS_TOKEN if config.has_cls_token else ""
    epochs = [epoch for epoch, _ in history]
    if history:
        values = [np.mean(reading["nonlocality"], axis=1) for _, reading in history]
        draw(pictures.draw_nonlocality, "nonlocality.png", [("", config, epochs, [values])], note)
        if history[0][1]["gates"]:
            gates = [reading["gates"] for _, reading in history]
            draw(pictures.draw_gates, "gates.png", epochs, [gates])
    if inspection.picture is not None:
        layers, picture = inspection.layers, inspection.picture
        draw(pictures.draw_maps, "maps.png", picture, layers, query, note)
        gpsa = [layer for layer in layers if layer["attention"] == "gpsa"]
        top = max((part.max() for layer in gpsa for part in layer["maps"].values()), default=1.0)
        for layer in gpsa:
            name = f"maps-layer{layer['layer']:02d}.png"
            draw(pictures.draw_parts, name, picture, layer, query, top)
    return names


def _in_grid(query, grid):
    """The query, or the middle patch of the grid."""
    if query is None:
        return grid[0] // 2, grid[1] // 2
    if not all(0 <= index < size for index, size in zip(query, grid, strict=True)):
        raise UserError(
            f"--query must name one of {grid[0]} rows and {grid[1]} columns of patches, "
            f"from 0,0 to {grid[0] - 1},{grid[1] - 1}, not {query[0]},{query[1]}"
        )
    return tuple(query)
