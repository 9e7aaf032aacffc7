"""What holds for all tests."""

import os
import signal
from pathlib import Path

import fakecupy
import pytest

from miniconvit import cli

ROOT = str(Path(__file__).parents[1])
# For the programs that tests start: this checkout comes before any copy that is installed.
folders = [ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(folders)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # --device auto is the CPU, whose bits are compared
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell began it with &


@pytest.fixture
def cupy(monkeypatch):
    """The stand-in for CuPy, which refuses to mix the host's arrays with its own."""
    yield fakecupy.install(monkeypatch)
    fakecupy.reset()


@pytest.fixture
def program(capsys):
    """Calls the command line: (exit status, standard output, standard error)."""

    def call(*argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main([str(word) for word in argv])
        return end.value.code, *capsys.readouterr()

    return call
