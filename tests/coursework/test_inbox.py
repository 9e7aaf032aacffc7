"""A folder of hostile submissions: none ends its grading, none makes the grader large.

`python test_inbox.py DOOR INBOX INSTRUCTOR OUT` is `miniconvit coursework grade` with shorter
limits, and then prints the most bytes that the grader had. Where DOOR is "open" the check of
sources lets all texts through, so that they run. Submission i is a pure function of (seed, i).
"""

import csv
import json
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from test_hostile import FATAL, POSIX, REFERENCE_FILE, RUBBISH, VALUES, gelu, returning, sending
from test_submissions import zipped

import miniconvit
from miniconvit import cli
from miniconvit.coursework import create, exercises, grading, submission
from miniconvit.coursework.sandbox import Limits
from miniconvit.coursework.skeleton import solution

ROOT = Path(miniconvit.__file__).parents[1]
RIGHT = {exercise.file: solution(exercise) for exercise in exercises(["gelu", "mhsa"])}
SECRET = "the secret of this coursework"
COUNT = 130
MOST_BYTES = 500e6


# Texts of gelu.py or mhsa.py


def asking(body):
    """MHSA that asks for right functions."""
    return (
        "# asks\nimport kit\nimport numpy as np\nfrom kit import linear_forward, softmax_forward\n"
        f"def attention_forward(*_): return 0, 0\ndef mhsa_forward(*_):\n    {body}\n"
    )


def fill(rng):
    shape = rng.choice([(1, 1, 300, 1), (1, 1, 8, 1024), (0, 64), (4, 0, 90), (1, 16_000)])
    return asking(f"while True: softmax_forward(np.ones({shape}))")


def attend(rng):
    """As many scores as a column has entries, squared, which are kept for a backward pass."""
    column = f"np.ones((1, 1, {rng.randrange(3000, 5000)}, 1))"
    return asking(f"while True: attention_forward({column}, {column}, {column})")


def column_times_row(rng):
    n = rng.randrange(3000, 5400)
    return asking(f"while True: linear_forward(np.ones(({n}, 1)), np.ones(({n}, 1)), np.ones({n}))")


def views(rng):
    return asking(f"while True: softmax_forward(np.ones((1, {rng.randrange(64, 8000)}, 1))[:, :1])")


def numbers(rng):
    number = rng.choice(["10**9", "10**400", "-1", "float('inf')", "float('nan')", "2**63"])
    return asking(f"return kit.softmax_backward(np.ones(3), {number})")


def deep_argument(rng):
    depth = rng.randrange(100, 30_000)
    return asking(f"a = ()\n    for _ in range({depth}): a = (a,)\n    softmax_forward(a)")


def die(rng):
    return f"import signal; signal.raise_signal({rng.randrange(1, 65)})"


def kill(rng):
    target = rng.choice(["0", "-1", "os.getppid()", "-os.getppid()"])
    return f"import os; os.kill({target}, {rng.choice([0, 9, 15, 19])})"


def fork(rng):
    call = rng.choice(["os.fork()", "os.forkpty()", "os.posix_spawn('/bin/true', ['true'], {})"])
    return f"import os\nwhile True:\n    try: {call}\n    except BaseException: pass"


def threads(_):
    return "import threading\nwhile True: threading.Thread(target=lambda: None).start()"


def talk(rng):
    text = rng.choice(
        ["'x' * 10**7", "'\\x1b]0;owned\\x07\\x1b[2J' * 99", "'\\ud800'", "b'\\0' * 99"]
    )
    return f"import sys\nwhile True: print({text}, file=sys.{rng.choice(['stdout', 'stderr'])})"


def complain(rng):
    text = rng.choice(
        ["'\\x1b[2J\\x07'", "'x' * 10**7", "chr(0xd800)", "'=cmd()'", "'\\n' * 10**6"]
    )
    return f"raise ValueError({text})"


def eat(rng):
    hog = rng.choice(["bytearray(1 << 20)", "[0] * 10**6", "np.ones(1 << 18)", "open('kit.py')"])
    return f"import numpy as np\nhog = []\nwhile True: hog.append({hog})"


def compute(rng):
    value = rng.choice(["9**9**9", "'x' * 10**12", "sum(range(10**12))", "sorted(range(10**9))"])
    return f"return {value}, 0"


def answer(rng):
    n = rng.randrange(5_000, 200_000)
    values = ["np.ones(N)", "'x' * N", "[0.0] * N", "{i: i for i in range(N)}", "np.ones((N, 0))"]
    return returning(rng.choice(values).replace("N", str(n)))


def sleep(rng):
    return rng.choice(["while True: pass", "import time; time.sleep(99)", "input()"])


def nested(rng):
    n = rng.randrange(1000, 90_000)
    return "#\n" + rng.choice(["-" * n + "1", "(" * n, "x = [" + "a," * n + "]", "x\n" * n])


def nested_blocks(rng):
    n = rng.randrange(50, 300)
    return "#\n" + "".join(" " * i + f"def f{i}():\n" for i in range(n)) + " " * n + "pass\n"


def coded(rng):
    codings = ["punycode", "rot13", "utf-7", "unicode_escape", "idna", "zlib", "utf-16", "nonsense"]
    return f"# coding: {rng.choice(codings)}\n" + "x" * 1000 + "-" + "a" * rng.randrange(20_000)


def binary(rng):
    return rng.choice([b"\xff\xfe", b"\xef\xbb\xbf", b"", b"\0"]) + rng.randbytes(3000)


def long_text(rng):
    return "#" * rng.randrange(200_001, 3_000_000)


def write_text(make):
    def write(path, rng):
        text = make(rng)
        text = text if isinstance(text, bytes) else gelu(text).encode()
        path.mkdir()
        (path / ("mhsa.py" if text.startswith(b"# asks") else "gelu.py")).write_bytes(text)

    return write


# Other things than texts. Each function writes one at `path`, whose name it may end with .zip


def special(make):
    """No file but a pipe, a socket, a link, ..., for a submission, a file or an archive in it."""

    def write(path, rng):
        place = rng.choice(["", "gelu.py", "work.zip", "src"])
        if not place:
            make(path.with_suffix(".zip"), rng)
            return
        path.mkdir()
        make(path / place, rng)

    return write


def pipe(path, _):
    os.mkfifo(path)


def listen(path, _):
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def link(path, rng):
    targets = ["/dev/zero", "/dev/stdin", "/", "..", path.name, "/etc/passwd", REFERENCE_FILE]
    path.symlink_to(rng.choice([*targets, path.parents[1] / "hidden.json", "nowhere"]))


def hard_link(path, rng):
    other = next(folder for folder in path.parents if (folder / "other").exists()) / "other"
    os.link(other, path)


def folder(path, rng):
    (path / rng.choice(["a", "gelu.py", "."])).mkdir(parents=True, exist_ok=True)


def deep_folders(path, rng):
    path.mkdir()
    (path / "/".join("d" * rng.randrange(40, 300))).mkdir(parents=True)


def many_files(path, rng):
    path.mkdir()
    for i in range(rng.randrange(500, 2000)):
        (path / f"gelu ({i}).py").write_bytes(b"#" * 9000)


def odd_names(path, rng):
    path.mkdir()
    for name in [
        "a\nb\x1b]0;owned\x07.py",
        "-rf.py",
        "\u202eyp.uleg",
        "x" * 252 + ".py",
        "=1+1.py",
    ]:
        (path / name).write_text("# nothing\n" * rng.randrange(9))
    (path / os.fsdecode(b"gelu\xff.py")).write_text("")


def manifest(path, rng):
    path.mkdir()
    n = rng.randrange(1000, 190_000)
    (path / "manifest.json").write_text(rng.choice(["[" * n, '{"skeleton": ' + "9" * n + "}"]))


def notebook(path, rng):
    path.mkdir()
    (path / "gelu.ipynb").write_text("[" * rng.randrange(1000, 9_000_000))


def archive(make):
    def write(path, rng):
        path.with_suffix(".zip").write_bytes(make(rng))

    return write


def bomb(rng):
    return zipped({"gelu.py": bytes(rng.randrange(10**7, 10**8))})


def bomb_in_bomb(rng):
    content = zipped({"gelu.py": bytes(10**7)})
    for i in range(rng.randrange(2, 7)):
        content = zipped({f"{i}{j}.zip": content for j in range(rng.randrange(1, 6))})
    return content


def large_archive_inside(rng):
    return zipped({"a.zip": bytes(rng.randrange(65, 100) << 20)})


def many_entries(rng):
    return zipped({f"{i}/gelu.py": "" for i in range(rng.randrange(10_000, 60_000))})


def other_method(rng):
    return zipped({"gelu.py": bytes(10**7)}, rng.choice([zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))


def places(rng):
    names = [
        "../gelu.py",
        "/etc/gelu.py",
        "C:\\gelu.py",
        "a/../../gelu.py",
        "//h/gelu.py",
        "gelu.py/",
    ]
    return zipped(dict.fromkeys(rng.sample(names, 3), "# nothing"))


def link_inside(rng):
    entry = zipfile.ZipInfo("gelu.py")
    entry.external_attr = 0o120777 << 16
    return zipped({entry: rng.choice(["/dev/zero", "../hidden.json"])})


def twisted(rng):
    """Numbers in its lists are others: sizes, offsets, methods, flags."""
    content = bytearray(zipped({"gelu.py": "# nothing\n" * 99, "b/mhsa.py": "# nothing"}))
    for _ in range(rng.randrange(1, 9)):
        place = content.index(b"PK\1\2") + rng.randrange(150)
        content[min(place, len(content) - 1)] = rng.choice([0, 1, 0xFF, rng.randrange(256)])
    return bytes(content)


def cut_short(rng):
    content = zipped(RIGHT)
    return content[: rng.randrange(len(content) - 22)]


def none_at_all(rng):
    return rng.choice([b"Rar!", b"7z\xbc\xaf", b"PK\3\4", b"PK\5\6", b""]) + rng.randbytes(5000)


TEXTS = (
    *(
        fill,
        attend,
        column_times_row,
        views,
        numbers,
        deep_argument,
        die,
        kill,
        fork,
        threads,
        talk,
    ),
    *(complain, eat, compute, answer, sleep, nested, nested_blocks, coded, binary, long_text),
)
SPECIAL = (pipe, listen, link, hard_link, folder)
FOLDERS = (deep_folders, many_files, odd_names, manifest, notebook)
ARCHIVES = (
    *(bomb, bomb_in_bomb, large_archive_inside, many_entries, other_method, places, link_inside),
    *(twisted, cut_short, none_at_all),
)
KNOWN = [body.replace("REFERENCE_FILE", repr(REFERENCE_FILE)) for body, _ in FATAL.values()]
KNOWN += [*map(sending, RUBBISH.values()), *(returning(value) for value, _ in VALUES.values())]
NEW = [*map(write_text, TEXTS), *map(special, SPECIAL), *FOLDERS, *map(archive, ARCHIVES)]
NAMES = ["grades.csv", "a\nb\x1b]0;owned\x07", "-rf", "=1+1", "\u202etxt", "x" * 200, "\udcff"]
"""Of students, beside ordinary ones."""


def make_inbox(inbox, seed):
    """COUNT hostile submissions: what test_hostile.py has, and the kinds above in turns."""
    inbox.mkdir()
    known = [write_text(lambda rng, text=text: text) for text in KNOWN]
    for i in range(COUNT):
        rng = random.Random(f"{seed} {i}")
        write = known[i] if i < len(known) else NEW[(i - len(known)) % len(NEW)]
        names = NAMES if seed else []
        write(inbox / (names[i] if i < len(names) else f"s{i:03}"), rng)


@POSIX
@pytest.mark.full
@pytest.mark.parametrize("door", ["shut", "open"])
@pytest.mark.parametrize("seed", [0, 1])
def test_130_hostile_submissions(seed, door):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)  # nobody may look into it
        (root / "secret").write_text(SECRET)
        (root / "other").write_text("# nothing\n")
        (root / "tmp").mkdir(mode=0o777)
        create(root / "kit", root / "secret", ["gelu", "mhsa"])
        make_inbox(root / "inbox", seed)
        (root / "inbox" / "zz-honest").mkdir()
        for file, text in RIGHT.items():
            (root / "inbox" / "zz-honest" / file).write_text(text)
        arguments = [door, root / "inbox", root / "kit" / "instructor", root / "out"]
        done = subprocess.run(
            [sys.executable, __file__, *map(str, arguments)],
            capture_output=True,
            text=True,
            env=os.environ | {"TMPDIR": str(root / "tmp"), "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        shown, _, most = done.stdout.rstrip("\n").rpartition("\n")
        with (root / "out" / "grades.csv").open(encoding="utf-8", newline="") as file:
            scores = {row["student"]: float(row["score"]) for row in csv.DictReader(file)}
        results = [path.read_text() for path in root.glob("out/*/results.json")]
        told = [test["output"] for text in results for test in json.loads(text)["tests"]]
        assert not list((root / "tmp").iterdir())
    print(f"\n{len(scores)} graded, the grader had {int(most) / 1e6:.0f} MB at most")
    assert len(scores) == len(results) == COUNT + 1 and all(told)
    assert {name for name, score in scores.items() if score} == {"zz-honest"}
    assert scores["zz-honest"] == 17
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert not any(SECRET in text for text in [shown, *results])
    assert int(most) < MOST_BYTES


def main(door, inbox, instructor, out):
    if door == "open":
        look_through = submission.look_through
        submission.look_through = lambda files: [
            one | {"problem": ""} if one["functions"] is not None else one
            for one in look_through(files)
        ]
    load, limits = grading.load_assignment, Limits(seconds=10.0, memory=1 << 29, output=100_000)
    grading.load_assignment = lambda folder: replace(load(folder), limits=limits)
    where = ["--instructor", instructor, "--out", out, "--jobs", "2"]
    try:
        cli.main(["coursework", "grade", inbox, *where])
    finally:
        print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


if __name__ == "__main__":
    main(*sys.argv[1:])
