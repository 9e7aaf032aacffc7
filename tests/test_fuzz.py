"""Damaged files for every reader: the answer is a sentence or a value, and never much memory.

`python test_fuzz.py FOLDER SEED COUNT` reads so many of them, and `python test_fuzz.py FOLDER NAME`
a hostile one, in a process of its own, and prints what came of it as JSON. Input i is a pure
function of (SEED, i): where it fails, it stays in FOLDER.
"""

import io
import json
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
from safetensors.numpy import save_file

from miniconvit import ConViTConfig, UserError, init_params
from miniconvit.checkpoints.checkpoint import load_checkpoint
from miniconvit.checkpoints.weights import open_weights
from miniconvit.cli.experiment import DATA_DIR, _kept_data_dir
from miniconvit.data.cifar import CIFAR10
from miniconvit.data.images import finding, read_image
from miniconvit.experiments.plan import complete, load_plan, make_plan, rows_of, speed_key
from miniconvit.model import param_shapes
from miniconvit.training.report import epoch_line, text_curve
from miniconvit.training.run_folder import RunFolder
from miniconvit.training.schedule import make_schedule
from miniconvit.training.settings import (
    make_settings,
    stored_data_dir,
    stored_settings,
    stored_sha256,
)
from miniconvit.training.state import begin_state, load_state

GOLDEN = Path(__file__).parent / "golden"
SIZE, DEPTH, HEADS = 8, 2, 4
CONFIG = ConViTConfig(SIZE, 4, 3, 3, embed_dim=8, depth=DEPTH, num_heads=HEADS, local_up_to_layer=1)
SETTINGS = make_settings(
    data="shapes", img_size=SIZE, patch_size=4, epochs=3, batch_size=4, ema=0.9
)
SCHEDULE = make_schedule(SETTINGS, 12)
MOST_BYTES, TIMES = 200e6, 10  # of a reader: so much, and so many times the file
MOST_SECONDS = 10.0


# What is damaged, and by what it is read.


def checkpoint(path, full):
    """A run's last checkpoint, or its best one."""
    state = begin_state(SETTINGS, CONFIG, np)
    about = {"mean": [0.5] * 3, "std": [0.2] * 3, "classes": ["a", "b", "ü"], "data": "shapes"}
    if full:
        state.save(path, SETTINGS, CONFIG, about)
    else:
        state.save_best(path, CONFIG, about)


def without_sha256(path):
    """Makes a checkpoint one from before there was a SHA-256."""
    header, data = parts(path.read_bytes())
    about = json.loads(header["__metadata__"]["miniconvit"])
    about.pop("sha256", None)
    header["__metadata__"]["miniconvit"] = json.dumps(about)
    path.write_bytes(whole(header, data))


def parts(content):
    """(header, bytes of the tensors) of a safetensors file, by the format's definition."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def whole(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def row(epoch):
    """As finish_epoch writes it."""
    values = {"epoch": epoch, "step": 3 * epoch, "train_loss": 2.1, "train_top1": 0.25}
    values |= {"val_loss": 2.3, "val_top1": 0.5, "lr": 1e-3}
    values |= {"nonlocality": [[1.5] * HEADS] * DEPTH, "gates": [[0.7] * HEADS]}
    values |= {"strengths": [[0.9] * HEADS], "centre_norms": [[1.0, None, 0.5, 2.0]]}
    return values | {"images_per_second": 100.0, "seconds": 1.5}


def plan(path):
    asked = complete("sample-efficiency", {"fractions": [0.1, 1.0], "budget": 50.0})
    rows = rows_of(asked)
    images = {row.settings.subset: int(45000 * row.settings.subset) for row in rows}
    speed = {"images_per_second": 900.0, "validation_seconds": 1.0, "start_seconds": 1.5}
    speeds = {speed_key(row.settings): speed for row in rows}
    make_plan(asked, rows, images, speeds, "nowhere").save(path)


SMALL10 = replace(
    CIFAR10,
    FILES={f"{name}.bin": (3 * 3073, None) for name in ("data_batch_1", "test_batch")}
    | {"names.txt": (None, None)},
    NAMES="names.txt",
    CLASSES=3,
    HELD_OUT=1,
)
SMALL100 = replace(
    SMALL10, FILES={"train.bin": (3 * 3074, None), "test.bin": (3 * 3074, None)}, LABELS=2
)
SMALL100.FILES["names.txt"] = (None, None)


def cifar(folder, data):
    """Three records a file; the real files differ in size and in having an MD5."""
    folder.mkdir()
    for name, (size, _) in data.FILES.items():
        records = np.arange(size or 0, dtype=np.uint8).reshape(3, -1)[:, : size and None]
        if size:
            records[:, : data.LABELS] = np.arange(3)[:, None]
        (folder / name).write_bytes(records.tobytes() if size else b"a\nb\nc\n")


def make_files(root):
    """{name: path} of one whole file of each kind, in a folder each."""
    files = {}

    def place(name, file):
        (root / name).mkdir(parents=True)
        files[name] = root / name / file
        return files[name]

    for name, full in (("ours last", True), ("ours best", False)):
        checkpoint(place(name, "last.safetensors"), full)
        old = place(name.replace("ours", "older"), "last.safetensors")
        checkpoint(old, full)
        without_sha256(old)
    params = init_params(CONFIG, seed=3)
    save_file(params, place("foreign", "model.safetensors"))
    save_file({k: v.astype("f2") for k, v in params.items()}, place("half", "a.safetensors"))
    save_file(params, place("hub", "config.json").with_name("model.safetensors"))
    known = {"mean": [0.5] * 3, "std": [0.2] * 3, "input_size": [3, SIZE, SIZE]}
    text = {"architecture": "convit_tiny", "pretrained_cfg": known, "label_names": ["a", "b", "c"]}
    files["hub"].write_text(json.dumps(text))
    for name in ("torch_model", "torch_model_legacy", "torch_tensors", "beside", "views_legacy"):
        shutil.copy(GOLDEN / f"{name}.pth", place(name, "a.pth"))
    about = {"settings": {**vars(SETTINGS)}, "model": CONFIG.to_dict(), "data_dir": "/data"}
    about |= {"place": "here", "workers": 2, "data_sha256": "0" * 64, "versions": {"numpy": "2"}}
    place("config", "config.json").write_text(json.dumps(about, indent=2))
    rows = "".join(json.dumps(row(epoch)) + "\n" for epoch in (1, 2, 3))
    place("metrics", "metrics.jsonl").write_text(rows)
    plan(place("plan", "plan.json"))
    plan(place("data_dir", DATA_DIR).with_name("plan.json"))
    files["data_dir"].write_text("/data/ünï\n")
    for name, data in (("cifar10", SMALL10), ("cifar100", SMALL100)):
        cifar(root / name, data)
        files[name] = root / name / next(iter(data.FILES))
    files["names"] = root / "cifar100" / "names.txt"
    try:
        from PIL import Image
    except ImportError:
        return files
    pixels = np.random.default_rng(5).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    for kind in ("png", "jpeg", "gif"):
        Image.fromarray(pixels).save(place(kind, f"a.{kind}"))
    return files


def read_resumed(path):
    load_state(path, SETTINGS, CONFIG, SCHEDULE, np)


def read_config(path):
    stored_settings(path.parent)
    stored_data_dir(path.parent)
    stored_sha256(path.parent, "data_sha256")


def read_metrics(path):
    rows = RunFolder(path.parent).finished_epochs()
    for row in rows:
        epoch_line(row)
    if rows:
        text_curve([row["val_top1"] for row in rows])


def read_rows(path):
    for row in RunFolder(path.parent).rows(2):
        epoch_line(row)


def read_plan(path):
    plan = load_plan(path)
    assert plan.runs and plan.minutes and plan.recipe


def read_cifar(data):
    return lambda path: data.read([path.parent], download=False)


def read_picture(path):
    finding(path)
    finding(path, thorough=True)
    read_image(path, (SIZE, SIZE))


OURS = (load_checkpoint, open_weights)
READERS = {
    "ours last": (*OURS, read_resumed),
    "ours best": OURS,
    "older last": (*OURS, read_resumed),
    "older best": OURS,
    "hub": (lambda path: open_weights(path.parent),),
    "config": (read_config,),
    "metrics": (read_metrics, read_rows),
    "plan": (read_plan,),
    "data_dir": (lambda path: _kept_data_dir(path.parent, None),),
    "cifar10": (read_cifar(SMALL10),),
    "cifar100": (read_cifar(SMALL100),),
    "names": (read_cifar(SMALL100),),
    **dict.fromkeys(("png", "jpeg", "gif"), (read_picture,)),
}
"""Kind to the functions that read it; the others are checkpoints that anyone may have written."""
NO_MODELS = {"torch_tensors", "beside", "views_legacy"}
"""Files of others that are refused even where they are whole."""


# The damage.


def flip(content, rng, _):
    """One bit, often in the first bytes."""
    size = rng.choice((len(content), min(len(content), 3000)))
    where = rng.randrange(8 * size)
    changed = bytearray(content)
    changed[where // 8] ^= 1 << where % 8
    return bytes(changed)


def cut(content, rng, _):
    begin, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return rng.choice((content[:begin], content[:begin] + content[end:], content[end:]))


def insert(content, rng, _):
    where, count = rng.randrange(len(content) + 1), rng.choice((1, 4, 300))
    return content[:where] + rng.randbytes(count) + content[where:]


def splice(content, rng, others):
    """A part of this file, or of another kind's, in the place of a part."""
    other = rng.choice((content, rng.choice(others)))
    begin, place = rng.randrange(len(other)), rng.randrange(len(content))
    count = rng.choice((1, 8, 200))
    return content[:place] + other[begin : begin + count] + content[place + count :]


NASTY = ["NaN", "1e999", "-Infinity", "9" * 30, "9" * 5000, "[" * 100_000 + "]" * 100_000]
NASTY += ['{"a":' * 900 + "1" + "}" * 900, '{"a": 1, "a": 2}', '"\\ud800"', '"\\u0000"', '"ü"']
NASTY += [
    "null",
    "true",
    "-1",
    "0",
    "1.5",
    "1e308",
    "1000000000000",
    "[]",
    "{}",
    '""',
    "[[1, [2]]]",
]
NASTY += ["[" + "[]," * 50_000 + "[]]", json.dumps("x" * 100_000)]


def twist(value, rng):
    """A JSON text of the value in which one part is another, missing or there twice."""
    places = []

    def walk(part):
        for key in part if isinstance(part, dict) else range(len(part)):
            places.append((part, key))
            if isinstance(part[key], dict | list):
                walk(part[key])

    value = json.loads(json.dumps(value))
    walk(value)
    if not places or rng.random() < 0.05:
        return rng.choice(NASTY)
    holder, key = rng.choice(places)
    kind = rng.choice(("replace", "replace", "replace", "drop", "swap", "add", "near"))
    if kind == "drop":
        del holder[key]
    elif kind == "swap":
        other, name = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[name]))
    elif kind == "add" and isinstance(holder, dict):
        holder[rng.choice(("x", "\ud800", "config"))] = holder[key]
    elif kind == "near" and isinstance(holder[key], int | float):
        holder[key] = holder[key] * rng.choice((-1, 2, 1e6, 10**12, 0.5)) + rng.choice((0, 1))
    else:
        holder[key] = "@@"
    return json.dumps(value).replace('"@@"', rng.choice(NASTY), 1)


def twist_json(content, rng, _):
    """Of a file, or of one line, or of the header of a safetensors file, or of its metadata."""
    if content[8:9] == b"{" and not content[:1].isspace() and content[:1] != b"{":
        header, data = parts(content)
        about = header.get("__metadata__", {}).get("miniconvit")
        if about and rng.random() < 0.6:
            header["__metadata__"]["miniconvit"] = twist(json.loads(about), rng)
            return whole(header, data)
        return whole(twist(header, rng).encode(), data)
    lines = content.split(b"\n")
    if content[:1] == b"{" and all(line[:1] == b"{" for line in lines[:-1]):
        where = rng.randrange(len(lines) - 1) if len(lines) > 1 else 0
        lines[where] = twist(json.loads(lines[where]), rng).encode()
        return b"\n".join(lines)
    try:
        return twist(json.loads(content), rng).encode()
    except ValueError:
        return flip(content, rng, _)


def twist_zip(content, rng, others):
    """One entry of a zip archive damaged, the archive itself whole."""
    if not content.startswith(b"PK"):
        return flip(content, rng, others)
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        victim = rng.choice([n for n in old.namelist() if old.getinfo(n).file_size])
        for name in old.namelist():
            entry = old.read(name)
            new.writestr(name, rng.choice(BYTES)(entry, rng, others) if name == victim else entry)
    return made.getvalue()


BYTES = (flip, cut, insert, splice)
DAMAGE = (*BYTES, twist_json, twist_json, twist_zip)


# The reading.


def most_memory():
    """Bytes that this process had at most, where the system says it."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def fuzz(root, seed, count):
    """Reads so many damaged files: {"inputs", "ours": how many of them are of our own checkpoints,
    "read" and "refused": how often, "megabytes": of memory, "largest": of a file}."""
    files = make_files(root)
    contents = {name: path.read_bytes() for name, path in files.items()}
    for name, path in files.items():
        for read in READERS.get(name, (open_weights,)) if name not in NO_MODELS else ():
            read(path)
    found = {"inputs": int(count), "read": 0, "refused": 0, "ours": 0}
    largest = 0
    for i in range(int(count)):
        rng = random.Random(f"{seed} {i}")
        name = rng.choice([*sorted(files), *3 * ["ours last", "ours best"]])
        damage = rng.choice(DAMAGE)
        content = damage(contents[name], rng, list(contents.values()))
        files[name].write_bytes(content)
        largest = max(largest, len(content))
        is_ours = name.startswith("ours") and damage is not twist_json
        for read in READERS.get(name, (open_weights,)):
            began, what = perf_counter(), f"input {i}: {files[name]} by {damage.__name__}"
            try:
                with redirect_stderr(io.StringIO()):
                    read(files[name])
            except UserError:
                found["refused"] += 1
            except BaseException:
                print(what, file=sys.stderr)
                raise
            else:
                found["read"] += 1
                assert not is_ours or content == contents[name], f"{what} is accepted"
            assert perf_counter() - began < MOST_SECONDS, f"{what} takes long"
        found["ours"] += is_ours and content != contents[name]
        files[name].write_bytes(contents[name])
    return found | {"megabytes": most_memory() / 1e6, "largest": largest / 1e6}


# Files that no accident makes: small ones that say large things.


def large_model(files):
    """A depth that needs more memory than there is."""
    header, data = parts(files["older best"].read_bytes())
    text = header["__metadata__"]["miniconvit"]
    header["__metadata__"]["miniconvit"] = text.replace('"depth": 2', '"depth": 1000000000')
    files["older best"].write_bytes(whole(header, data))
    return "older best"


def many_blocks(files):
    """A tensor of a block's name for each of 20,000 blocks."""
    header, data = parts(files["foreign"].read_bytes())
    end = {"dtype": "F32", "shape": [0], "data_offsets": [len(data)] * 2}
    header |= {f"blocks.{i}.x": end for i in range(20_000)}
    files["foreign"].write_bytes(whole(header, data))
    return "foreign"


def repeated_storage(files):
    """A ConViT of 400 million parameters, all views of one storage."""
    config = ConViTConfig(SIZE, 4, embed_dim=4096, depth=2, local_up_to_layer=1)
    pairs = b"".join(as_text(k) + tensor(v) for k, v in param_shapes(config).items())
    storages = {"0": bytes(1_500_000)}
    write_archive(files["torch_model"], b"\x80\x02}(" + pairs + b"u.", storages)
    return "torch_model"


def tuples_in_tuples(files):
    """As a tensor's metadata, of which a set was made: a hash of so deep a tuple is a crash."""
    deep = b")" + b"\x85" * 900_000
    write_archive(
        files["torch_model"],
        b"\x80\x02}" + as_text("a") + tensor((2,), deep) + b"s.",
        {"0": bytes(8)},
    )
    return "torch_model"


def as_text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(shape, metadata=None):
    """The pickle of a tensor all of whose elements are the first of storage 0."""
    name = as_text("storage") + b"ctorch\nFloatStorage\n" + as_text("0") + as_text("cpu")
    axes = [
        b"(" + b"".join(b"J" + struct.pack("<i", n) for n in s) + b"t"
        for s in (shape, (0,) * len(shape))
    ]
    count = b"J" + struct.pack("<i", 2 if metadata else 375_000)
    more = b"\x89}" + (metadata or b"")
    call = b"ctorch._utils\n_rebuild_tensor_v2\n((" + name + count + b"tQK\x00"
    return call + b"".join(axes) + more + b"tR"


def write_archive(path, program, storages):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", program)
        for key, content in storages.items():
            file.writestr(f"a/data/{key}", content)


def many_lists(name):
    """A JSON of little but empty lists, of which a byte costs most."""

    def write(files):
        lists = "[" + "[]," * 1_390_000 + "[]]"
        text = '{"architecture": "x", "mean": ' + lists + "}"
        content = text.encode()
        if name == "foreign":
            content = whole(content, b"")
        elif name == "older best":
            header, data = parts(files[name].read_bytes())
            about = header["__metadata__"]["miniconvit"].replace("[0.5, 0.5, 0.5]", lists)
            header["__metadata__"]["miniconvit"] = about
            content = whole(header, data)
        files[name].write_bytes(content)
        return name

    return write


def long_rows(files):
    """Rows that are right but for the number of their heads."""
    text = json.dumps(row(1) | {"nonlocality": [[1]] * 300_000}).replace(" ", "")
    files["metrics"].write_text("".join(text + "\n" for _ in range(5)))
    return "metrics"


LISTS = ("config", "hub", "plan", "foreign", "older best")
HOSTILE = {
    "large model": large_model,
    "many blocks": many_blocks,
    "repeated storage": repeated_storage,
    "tuples in tuples": tuples_in_tuples,
    **{f"lists in {name}": many_lists(name) for name in LISTS},
    "long rows": long_rows,
}


def read_hostile(root, name):
    """What came of reading this file: {"refused", "megabytes", "largest"}."""
    files = make_files(root)
    kind = HOSTILE[name](files)
    began = perf_counter()
    for read in READERS.get(kind, (open_weights,)):
        with pytest.raises(UserError):
            read(files[kind])
    assert perf_counter() - began < MOST_SECONDS
    return {"megabytes": most_memory() / 1e6, "largest": files[kind].stat().st_size / 1e6}


def run(tmp_path, *arguments):
    """What a process of its own prints, as JSON."""
    command = [sys.executable, __file__, tmp_path / "files", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 0 < found["megabytes"] < MOST_BYTES / 1e6 + TIMES * found["largest"]
    return found


@pytest.mark.parametrize(
    ("seed", "count"), [("0", 1000), pytest.param("1", 10_000, marks=pytest.mark.full)]
)
def test_damaged_files_are_answered_by_a_sentence(tmp_path, seed, count):
    found = run(tmp_path, seed, str(count))
    print(found)
    assert found["inputs"] == count
    assert found["ours"] > count / 50 and found["refused"] > found["read"] > count / 10


@pytest.mark.parametrize("name", HOSTILE)
def test_small_files_that_say_large_things_cost_nothing(tmp_path, name):
    run(tmp_path, name)


if __name__ == "__main__":
    warnings.simplefilter("error", RuntimeWarning)
    resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))  # a reader without bounds ends here
    folder, *what = sys.argv[1:]
    reads = read_hostile if len(what) == 1 else fuzz
    print(json.dumps(reads(Path(folder), *what)))
