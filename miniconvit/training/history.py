"""What a run has recorded of its attention, from its initialisation on."""

from ..analysis.readings import reading_images, readings
from ..errors import UserError
from .freeze import initial_params
from .run_folder import RunFolder
from .settings import stored_settings


def run_history(folder, config, dataset):
    """What the run in the folder has recorded of its attention: a list of (epoch, readings).

    Epoch 0 is measured now, on the initial parameters and the same images; a run that began with
    parameters from elsewhere has none.
    """
    rows = [row for row in RunFolder(folder).finished_epochs() if "nonlocality" in row]
    settings = stored_settings(folder)
    if not rows or settings is None:
        return []
    start = initial_params(config, settings.seed, settings.freeze)
    first = readings(reading_images(dataset), start, config)
    if not all(_fits(row, first) for row in rows):
        raise UserError(f"the readings in {folder}/metrics.jsonl are not those of this model")
    history = [(row["epoch"], {key: row[key] for key in first}) for row in rows]
    return history if settings.init_from else [(0, first), *history]


def _fits(row, first):
    """Whether a row has as many layers and heads as the readings `first`, and numbers to draw."""
    sizes = [{key: [len(heads) for heads in of[key]] for key in first} for of in (row, first)]
    drawn = [*row["nonlocality"], *row["gates"]]
    return sizes[0] == sizes[1] and not any(None in heads for heads in drawn)
