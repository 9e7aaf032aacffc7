"""Writes tests/cupy_names.txt: what the installed CuPy offers. No GPU is needed.

pip install cupy-cuda13x && python tests/cupy_names.py
"""

from importlib import import_module
from pathlib import Path

FILE = Path(__file__).with_suffix(".txt")
MODULES = ("cupy", "cupy.cuda", "cupy.cuda.runtime", "cupy.linalg", "cupyx.scipy.special")


def installed_names():
    """Full names of public functions and classes, and of the methods of a few of these."""
    owners = {name: import_module(name) for name in MODULES}
    cupy = owners["cupy"]
    owners |= {
        f"cupy.cuda.{name}": getattr(cupy.cuda, name) for name in ("MemoryPool", "Stream", "Graph")
    }
    owners |= {"cupy.ndarray": cupy.ndarray, "cupy.RawModule": cupy.RawModule}
    return {
        f"{owner}.{name}"
        for owner, thing in owners.items()
        for name in dir(thing)
        if not name.startswith("_") or (owner == "cupy.ndarray" and name.endswith("__"))
    }


def recorded_names():
    """The committed names, without the first line, which tells the version."""
    return set(FILE.read_text().splitlines()[1:])


if __name__ == "__main__":
    version = import_module("cupy").__version__
    FILE.write_text("\n".join([f"# CuPy {version}", *sorted(installed_names())]) + "\n")
    print(f"wrote {FILE}")
