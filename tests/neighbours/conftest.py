"""Runs and folders that several of these tests need."""

import pytest
from small_run import small_dataset

from miniconvit.cli import eval as evaluation
from miniconvit.training import run as run_module


@pytest.fixture
def small_data(monkeypatch, tmp_path):
    """Every data set has 8x8 images, and runs lie in an empty folder."""
    for module in (run_module, evaluation):
        monkeypatch.setattr(module, "load_dataset", small_dataset)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folders_of_others(tmp_path):
    """make(experiment): other/, full/ and damaged/, in which it cannot go on."""

    def make(experiment):
        damaged = f'{{"experiment": "{experiment}", "steps": "8"}}'
        files = {"other/plan.json": "{}", "full/diary.txt": "", "damaged/plan.json": damaged}
        for name, text in files.items():
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_text(text)

    return make
