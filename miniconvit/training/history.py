"""What a run has recorded of its attention, from its initialisation on."""

from ..analysis.readings import reading_images, readings
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
    history = [(row["epoch"], {key: row[key] for key in first}) for row in rows]
    return history if settings.init_from else [(0, first), *history]
