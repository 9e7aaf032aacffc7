"""Makes the pages of the API from the docstrings: `python docs/api/build.py FOLDER`."""

import sys
from pathlib import Path

try:
    import pdoc
except ImportError:
    sys.exit("the pages are made by pdoc, which is missing: pip install -e '.[docs]'")

import miniconvit

PARTS = ("config", "training", "checkpoints")
"""What is documented beside the names of `miniconvit` itself and the layers."""


def build(folder):
    """Writes the pages into the folder; index.html is the one to open."""
    for name in miniconvit.__all__:  # what is imported when somebody asks for it
        setattr(miniconvit, name, getattr(miniconvit, name))
    pdoc.render.configure(template_directory=Path(__file__).parent, docformat="markdown")
    pdoc.pdoc("miniconvit", *(f"miniconvit.{part}" for part in PARTS), output_directory=folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER")
    build(Path(sys.argv[1]))
    print(f"open {Path(sys.argv[1], 'index.html')}")
