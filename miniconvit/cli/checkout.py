"""Whoever edits a checkout must not be told about another copy of the package."""

from pathlib import Path

from ..errors import UserError

PACKAGE = Path(__file__).parents[1]
KINDS = {".py", ".toml", ".txt", ".cu", ".js", ".css", ".html"}


def check_copy(folder, package=PACKAGE):
    """Raises UserError where the folder is in a checkout whose files differ from the package's.

    package: the folder of the package that runs. A copy that was installed from the checkout, and
    that is still like it, does no harm.
    """
    for root in (folder, *folder.parents):
        if _is_checkout(root):
            edited = root / "miniconvit"
            if not edited.samefile(package) and _files(edited) != _files(package):
                raise UserError(
                    f"{root} is a checkout of miniconvit, but this command runs the copy in "
                    f"{package}, which differs from it: pip install -e {root}"
                )
            return


def _is_checkout(root):
    try:
        has_package = (root / "miniconvit" / "__init__.py").is_file()
        return has_package and b"\nname = miniconvit\n" in (root / "setup.cfg").read_bytes()
    except OSError:  # nobody edits what cannot be read
        return False


def _files(package):
    """Name to content of all code and all tables. What an editor leaves beside them is no part."""
    return {
        path.relative_to(package): path.read_bytes()
        for path in package.rglob("*")
        if path.suffix in KINDS
    }
