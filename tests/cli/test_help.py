"""What the help says: groups, whole sentences, and lines that fit into 80 columns."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import miniconvit
from miniconvit import cli
from miniconvit.cli.options import GROUPS
from miniconvit.config import VARIANTS
from miniconvit.coursework import EXERCISES
from miniconvit.data.augment import PRESETS
from miniconvit.data.dataset import SOURCES
from miniconvit.experiments.plan import EXPERIMENTS
from miniconvit.gradcheck.cases import CASES
from miniconvit.training.settings import FIELDS, RECIPES, flag

NO_SETTINGS = {"--data-dir", "--any-size", "--no-download", "--device", "--workers"}
NO_SETTINGS |= {"--out", "--resume", "--quiet"}
"""The options of train that change no bit of what a run writes."""


def commands(group=cli.program, path=()):
    """(words, command) of every command, the program itself first."""
    yield " ".join(path), group
    if isinstance(group, click.Group):
        for name in group.list_commands(None):
            yield from commands(group.get_command(None, name), (*path, name))


EVERY = dict(commands())


@pytest.fixture
def help_of(program, monkeypatch):
    """The help of a command on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(path, how="--help"):
        status, out, err = program(*path.split(), how)
        assert (status, err) == (0, "")
        return out

    return call


def problem(text):
    """Why a text is no whole sentences, or None. A default may stand behind them in brackets."""
    sentences = re.sub(r"  \[default: [^][]+\]$", "", text.strip())
    if not re.fullmatch(r"[^\s[].*[^.\s]\.", sentences, re.DOTALL):
        return f"it does not end with a period: {sentences}"
    if ";" in text:
        return f"it has a semicolon: {text}"
    plain = re.sub(r"(\S+,\s+){3,}\S+", "names", sentences)
    long = [one for one in re.split(r"\.\s", plain) if len(one.split()) > 20]
    return f"a sentence is long: {long[0]}" if long else None


def test_a_text_that_is_no_sentence_is_found():
    assert problem("Random seed.") is None
    assert problem("Random seed.  [default: 0]") is None
    assert problem("Of all that is random")
    assert problem("Learning rate; at its peak.")
    assert problem("Number of steps.  [default: 1; 2]")
    assert problem("word " * 21 + "end.")


@pytest.mark.parametrize("path", EVERY)
def test_every_help_fits_and_is_whole_sentences(help_of, path):
    out = help_of(path)
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "..." not in re.sub(r"IMAGE\]?\.\.\.|RUN\.\.\.|\[ARGS\]\.\.\.|X,Y,\.\.\.", "", out)
    assert ";" not in out
    assert help_of(path, "-h") == out
    command = EVERY[path]
    text = re.sub("\b.*?\n\n", "", command.help, flags=re.DOTALL)  # but the table of experiments
    assert problem(text) is None
    for param in command.params:
        if isinstance(param, click.Option) and not param.is_eager:
            assert problem(param.help) is None, param.opts


@pytest.mark.parametrize("path", [path for path in EVERY if path])
def test_a_short_help_is_never_cut_off(help_of, path):
    *above, name = path.split()
    short = EVERY[path].get_short_help_str(200)
    assert len(short) < 45
    assert problem(short) is None
    assert re.search(rf"^  {name} +{re.escape(short)}$", help_of(" ".join(above)), re.MULTILINE)


def test_every_option_of_train_is_a_setting_or_stated():
    """Every field of Settings has what the help and the checks need."""
    for name, field in FIELDS.items():
        about = field.metadata
        assert about["group"] in GROUPS, name
        assert about["limits"].words and callable(about["limits"].hold), name
        assert problem(about["help"]) is None, name
    flags = {option.opts[0] for option in EVERY["train"].params}
    assert flags == {flag(name) for name in FIELDS} | NO_SETTINGS


def test_options_stand_in_groups(help_of):
    """Each under the heading that its setting names, in the order of GROUPS."""
    parts = re.split(r"^([A-Z][\w ]+):$", help_of("train"), flags=re.MULTILINE)
    shown = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(shown) == list(GROUPS)
    for name, field in FIELDS.items():
        heading = field.metadata["group"]
        pattern = rf"^  {flag(name)}\b[ /]"
        assert [group for group in shown if re.search(pattern, shown[group], re.M)] == [heading]
    assert re.search(r"^  --out FOLDER", shown["Run"], re.MULTILINE)
    assert re.search("^Options:$", help_of("doctor"), re.MULTILINE)


@pytest.mark.parametrize(
    "path, names",
    [
        ("train", [*SOURCES, *RECIPES, *PRESETS]),
        ("train", [name.removeprefix("convit_") for name in VARIANTS if "convit" in name]),
        ("data", SOURCES),
        ("experiment", EXPERIMENTS),
        ("gradcheck", CASES),
        ("coursework create", [exercise.name for exercise in EXERCISES]),
    ],
)
def test_all_names_to_choose_from_are_shown(help_of, path, names):
    words = set(re.findall(r"[\w-]+", re.sub(r"-\n +", "-", help_of(path))))
    assert set(names) <= words


def test_the_defaults_are_shown(help_of):
    out = " ".join(help_of("train").split())
    assert "Weight decay. [default: 0.05]" in out
    assert "Random seed. [default: 0]" in out
    assert re.search(r"Share of each target [^.]*\. \[default: the recipe's, else 0\]", out)
    assert re.search(r"Number of images in a step\. \[default: the recipe's\]", out)
    out = " ".join(help_of("bench").split())
    assert "Number of images in a step. [default: 64]" in out


TYPOS = {
    "command": ("trian", "train"),
    "command of a group": ("coursework grad", "grade"),
    "option": ("train --epoch 3", "--epochs"),
    "model": ("train --model convit_tny32", "convit_tiny32"),
    "recipe": ("train --recipe papr32", "paper32"),
    "data": ("train --data cifar", "cifar10"),
    "data set": ("data imagefoldr", "imagefolder"),
    "layer": ("gradcheck --layer gpas", "gpsa"),
    "experiment": ("experiment ablaton", "ablation"),
    "exercise": ("coursework check --exercise layer_norm", "layernorm"),
    "device": ("bench --device cdua", "cuda"),
}


@pytest.mark.parametrize("typo", TYPOS)
def test_a_mistyped_name_is_answered_with_the_closest(program, typo):
    argv, meant = TYPOS[typo]
    status, out, err = program(*argv.split())
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"Error: [^\n]*[Dd]id you mean [^\n]*{meant}\b[^\n]*\n", err)


@pytest.mark.parametrize(
    "call, meant",
    [
        ("gradcheck.cases.check_layer('gpas')", "gpsa"),
        ("training.settings.make_settings('papr32')", "paper32"),
        ("training.settings.make_settings(model='convit_tny32')", "convit_tiny32"),
        ("training.settings.make_settings(augment='papr')", "paper"),
        ("data.load_dataset('shape')", "shapes"),
        ("engine.cuda.resolve_device('cdua')", "cuda"),
        ("coursework.load_assignment.__globals__['exercises'](['gleu'])", "gelu"),
        ("ConViTConfig.from_dict({'widht': 1, 'depht': 2})", "depth"),
    ],
)
def test_so_are_python_callers(call, meant):
    with pytest.raises(miniconvit.UserError, match=rf"\(did you mean {meant}\?\)"):
        eval(f"miniconvit.{call}", {"miniconvit": miniconvit})


def test_what_is_close_to_nothing_gets_the_list_alone(program):
    _, _, err = program("train", "--recipe", "risotto")
    assert "did you mean" not in err
    assert all(name in err for name in RECIPES)


def test_python_m_miniconvit():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "miniconvit"]
    version, wrong = (
        subprocess.run([*command, *rest], capture_output=True, text=True, cwd=root, timeout=60)
        for rest in (["--version"], ["trian"])
    )
    assert version.stdout == f"miniconvit {miniconvit.__version__}\n"
    assert wrong.returncode == 2
    assert wrong.stderr.endswith("(see python -m miniconvit --help)\n")
