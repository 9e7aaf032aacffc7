"""Whoever edits a layer in a checkout sees it at once, whatever copy is installed."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from miniconvit.cli.checkout import check_copy
from miniconvit.errors import UserError

ROOT = Path(__file__).parents[2]
LAYER = Path("miniconvit") / "layers" / "softmax.py"
RIGHT, WRONG = "return y * (dy - ", "return y * (2 * dy - "


@pytest.fixture
def checkout(tmp_path):
    """A checkout with all that the commands and the tests of a layer need."""
    root = tmp_path / "checkout"
    without_caches = shutil.ignore_patterns("__pycache__")
    for folder in ("miniconvit", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=without_caches)
    for file in ("setup.cfg", "pyproject.toml", "cli.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, root)
    return root


@pytest.fixture
def installed(checkout, tmp_path):
    """A copy of the package as pip installs it, with the command's script."""
    package = tmp_path / "site-packages" / "miniconvit"
    shutil.copytree(checkout / "miniconvit", package)
    script = "import sys; sys.path.insert(1, {!r}); from miniconvit.cli import main; main()"
    (tmp_path / "miniconvit").write_text(script.format(str(package.parent)))
    return package


def plant(root):
    text = (root / LAYER).read_text()
    assert text.count(RIGHT) == 1
    (root / LAYER).write_text(text.replace(RIGHT, WRONG))


def test_a_copy_that_differs_from_the_checkout_is_refused(checkout, installed, tmp_path):
    for folder in (checkout, checkout / "tests", tmp_path):
        check_copy(folder, installed)
    plant(checkout)
    for folder in (checkout, checkout / "tests"):
        check_copy(folder, checkout / "miniconvit")
        with pytest.raises(UserError, match=f"but this command runs the copy in {installed}"):
            check_copy(folder, installed)
    check_copy(tmp_path, installed)  # the same copy elsewhere
    setup = checkout / "setup.cfg"
    setup.write_text(setup.read_text().replace("name = miniconvit", "name = another"))
    check_copy(checkout, installed)  # a project of somebody else
    setup.write_bytes(b"\xff\xfe name \x00")
    check_copy(checkout, installed)
    setup.unlink()
    setup.mkdir()  # what no one can read as a file
    check_copy(checkout, installed)


def test_every_file_that_is_installed_counts(checkout, installed):
    """Kernels, tables and what pages are made of no less than Python."""
    paths = [path for path in (checkout / "miniconvit").rglob("*") if path.is_file()]
    for suffix in {path.suffix for path in paths} - {".typed"}:  # which is empty
        path = next(path for path in paths if path.suffix == suffix)
        true = path.read_bytes()
        path.write_bytes(true + b"\n")
        with pytest.raises(UserError, match="differs from it"):
            check_copy(checkout, installed)
        path.write_bytes(true)


def test_the_command_says_that_it_runs_another_copy(checkout, installed, tmp_path):
    def gradcheck():
        script = [sys.executable, "-I", tmp_path / "miniconvit", "gradcheck", "--layer", "softmax"]
        ended = subprocess.run(script, cwd=checkout, capture_output=True, text=True, timeout=120)
        return ended.returncode, ended.stdout, ended.stderr

    status, out, _ = gradcheck()
    assert status == 0 and "all right" in out
    plant(checkout)
    status, out, err = gradcheck()
    assert (status, out) == (2, "")
    assert err.startswith(f"Error: {checkout} is a checkout") and err.count("\n") == 1


@pytest.mark.full
def test_a_planted_bug_is_seen_beside_a_copy_that_pip_installed(checkout, tmp_path):
    """In a new environment, which borrows the dependencies of this one."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(venv / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", str(checkout)]
    subprocess.run(pip, check=True, env={})
    shutil.rmtree(checkout / "build", ignore_errors=True)
    assert (site / "miniconvit" / "layers").is_dir()

    def run(*words):
        ended = subprocess.run(words, cwd=checkout, capture_output=True, text=True, env={})
        return ended.returncode, ended.stdout + ended.stderr

    gradcheck = "gradcheck", "--layer", "softmax"
    tests = python, "-c", "import sys, pytest; sys.path.pop(0); sys.exit(pytest.main(sys.argv[1:]))"
    tests = *tests, "-q", "-p", "no:cacheprovider", "tests/gradcheck", "-k", "softmax"
    assert run(venv / "bin" / "miniconvit", *gradcheck)[0] == 0
    assert run(*tests)[0] == 0
    plant(checkout)
    status, said = run(venv / "bin" / "miniconvit", *gradcheck)
    assert status == 2 and "is a checkout of miniconvit" in said
    for here in ([python, "cli.py"], [python, "-m", "miniconvit"]):
        status, said = run(*here, *gradcheck)
        assert status == 1 and "WRONG, see above" in said
    assert run(*tests)[0] == 1
