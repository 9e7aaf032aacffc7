"""The training step and inference on a CPU, in float32 and bf16, against timm's ConViT and DeiT on
PyTorch.

    pip install '.[bench,fast]'
    python benchmarks/cpu.py FOLDER [--minutes 2] [--only TEXT] [--without SIDE]

Every side of a row is a process of its own (so its peak memory is its own) on as many cores, and
all of them live as long as the row: they take turns of about a second, forwards and backwards, so
that a machine that changes its speed changes it for all. A ratio is the median of the turns'
ratios. Nothing else should run: a round beside another busy program is measured again. Each group
of a row is appended to FOLDER/measurements.jsonl as soon as it is measured and is not repeated when
the script is started again; table.md and table.json are written from that file.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median

import click
import numpy as np
from cpu_side import MATMUL_GFLOP
from threadpoolctl import threadpool_info

from miniconvit.config import VARIANTS
from miniconvit.engine.cuda import check_precision
from miniconvit.errors import UserError
from miniconvit.model import param_shapes
from miniconvit.system import available_cores, available_threads, numba_version

ROOT = Path(__file__).parent.parent
PROC = Path("/proc")
SHAPES = {"Ti 32x32 / 4": "tiny32", "Ti 224x224 / 16": "tiny", "S 224x224 / 16": "small"}
OURS, TIMM, TWIN, DEIT, COMPILED = "ours", "convit", "twin", "deit", "compiled"
BF16, AUTOCAST, ONEDNN = "ours-bf16", "autocast", "onednn"
SIDES = OURS, BF16, TIMM, AUTOCAST, ONEDNN, TWIN, DEIT, COMPILED
MATMUL = "matmul"  # nothing but matrix products: what the machine gives at that moment
TURN = 1.0  # second: shorter steps are repeated, and the first one, with a cold cache, not counted
PAUSE = 0.25  # seconds before a turn, in which the threads of the last one stop waiting for work
MIN_ROUNDS = 3
BUSY = 0.05  # of the cores' time: a round in which other programs took more is measured again
REPEATS = 10  # rounds of a group that are measured again, at most


def plan():
    """(name, variant, batch, mode, groups of sides) of every row, the most telling ones first.
    Each group is beside ours again: the memory of all at once may be too much."""
    for mode in ("train", "infer"):
        for batch in (16, 128):
            for name, variant in SHAPES.items():
                compiled = (variant, batch, mode) == ("tiny32", 128, "train")
                large = variant != "tiny32" and batch == 128  # oneDNN takes as much memory as timm
                groups = (
                    (OURS, TIMM, TWIN, MATMUL),
                    (OURS, DEIT, *([COMPILED] if compiled else [])),
                    (OURS, BF16, AUTOCAST, *([] if large else [ONEDNN])),
                )
                yield f"{name}, batch {batch}, {mode}", variant, batch, mode, groups


class Side:
    """A process of cpu_side.py that makes a step when it is asked to."""

    def __init__(self, who, *arguments):
        line = [sys.executable, ROOT / "benchmarks/cpu_side.py", who, *arguments]
        found = os.environ.get("PYTHONPATH")
        path = os.pathsep.join([str(ROOT), *([found] if found else [])])
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(word) for word in line], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip

    def step(self):
        """Its seconds. Raises RuntimeError with the last line of what the process said."""
        try:
            os.write(self._process.stdin.fileno(), b"step\n")
            return float(self._process.stdout.readline())
        except (BrokenPipeError, ValueError):
            status = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            last = said[-1] if said else "killed, probably for want of memory"
            raise RuntimeError(f"exit {status}: {last[:200]}") from None

    def turn(self):
        """The median second of the steps of a turn."""
        time.sleep(PAUSE)
        taken = [self.step()]
        while sum(taken) < TURN:
            taken.append(self.step())
        return median(taken[1:] or taken)

    def facts(self):
        """What the process says at its end."""
        self._process.stdin.close()
        return json.loads(self._process.stdout.read())

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._process.kill()
        with self._process:  # closes its pipes and waits for its end
            self._errors.close()


def usage():
    """Ticks of the cores that we may use: (all, the busy ones, those of this process and of all
    below it). None where there is no /proc."""
    try:
        lines = (PROC / "stat").read_text().splitlines()
    except OSError:
        return None
    cores = {f"cpu{number}" for number in available_cores()}
    ticks = [line.split()[1:9] for line in lines if line.partition(" ")[0] in cores]
    ticks = [[int(number) for number in core] for core in ticks]  # user, nice, system, idle, iowait
    parents, used = {}, {}
    for file in PROC.glob("[0-9]*/stat"):
        with suppress(OSError):  # it is over
            words = file.read_bytes().rpartition(b")")[2].split()
            number = int(file.parent.name)
            parents[number] = int(words[1])
            used[number] = sum(int(word) for word in words[11:15])  # with children that are over

    def ours(number):
        while number in parents and number != os.getpid():
            number = parents[number]
        return number == os.getpid()

    everything, idle = sum(map(sum, ticks)), sum(sum(core[3:5]) for core in ticks)
    return everything, everything - idle, sum(used[number] for number in used if ours(number))


def others_share(before, after):
    """The share of the cores' time that other programs took between two calls of usage."""
    if before is None or after is None:
        return 0.0
    everything, busy, ours = (end - start for start, end in zip(before, after, strict=True))
    return max(busy - ours, 0) / everything if everything else 0.0


def measure(sides, arguments, seconds):
    """{"found": {side: its turns' seconds and facts, or {"error": why there are none}},
    "disturbed": how many of the rounds ran beside other programs, for want of repeats}."""
    found = {who: {"seconds": []} for who in sides}
    with ExitStack() as stack:
        running = {who: stack.enter_context(Side(who, *arguments)) for who in sides}

        def ask(question, who):
            try:
                return question(running[who])
            except RuntimeError as error:
                found[who] = {"error": str(error)}
                del running[who]

        for who in sides:  # the first steps ask the system for memory
            first = ask(Side.step, who) or TURN
            if who in running and (first < TURN or who == COMPILED):  # its second compiles too
                ask(Side.step, who)
        began, rounds, repeats, disturbed = time.perf_counter(), 0, 0, 0
        while running and (rounds < MIN_ROUNDS or time.perf_counter() - began < seconds):
            before = usage()
            order = list(running)[:: 1 if rounds % 2 else -1]
            turns = {who: ask(Side.turn, who) for who in order}
            busy = others_share(before, usage()) > BUSY
            if busy and repeats < REPEATS:
                repeats += 1
                continue
            for who in running:
                found[who]["seconds"].append(turns[who])
            disturbed += busy
            rounds += 1
        for who in list(running):
            found[who] |= running[who].facts()
    return {"found": found, "disturbed": disturbed}


def step_gflop(variant, mode):
    """Floating-point work of an image: two per weight and token, and the attention products; a
    training step costs three forwards."""
    config = VARIANTS[f"convit_{variant}"]
    shapes = param_shapes(config)
    weights = sum(int(np.prod(s)) for name, s in shapes.items()
                  if name.endswith("weight") and len(s) > 1 and "pos_proj" not in name
                  and not name.startswith("head"))  # fmt: skip
    attention = 2 * config.num_patches * config.embed_dim * config.depth
    forward = 2 * config.num_patches * (weights + attention)
    return forward * (3 if mode == "train" else 1) / 1e9


def table(results):
    """The Markdown table, of the columns in which something stands, and its rows as dicts."""
    head = [
        "row", "ours, images/s", "timm ConViT", "ratio", "autocast", "ratio", "oneDNN bf16",
        "ratio", "timm DeiT", "ratio", "our ViT twin", "ConViT / twin time",
        "peak memory, MB: ours", "timm", "autocast", "of matmul peak",
    ]  # fmt: skip
    body, rows, after = [], [], []
    for name, variant, batch, mode, _ in plan():
        measured = [result for result in results if result["row"] == name]
        groups = [result["found"] for result in measured]
        for result in measured:
            after += _troubles(name, result)
        for own, label in ((OURS, name), (BF16, f"{name}, bf16")):
            turns, found = _beside(own, groups, batch)
            if not turns:
                continue
            nothing = None, [None] * 3, None
            speed, ratio, memory = (
                {who: found.get(who, nothing)[i] for who in (*SIDES, MATMUL)} for i in range(3)
            )
            share = batch * step_gflop(variant, mode) / MATMUL_GFLOP  # of one large product
            rows.append({
                "row": label,
                "turns": turns,
                "images_per_second": speed,
                "ratio": {who: ratio[who] for who in SIDES if who != own},
                "convit_over_twin_time": ratio[TWIN][0] and 1.0 / ratio[TWIN][0],
                "peak_memory_mb": memory,
                "share_of_matmul_peak": ratio[MATMUL][0] and share * ratio[MATMUL][0],
            })  # fmt: skip
            cells = [label, _shown(speed[own], 1)]
            for who in (TIMM, AUTOCAST, ONEDNN, DEIT):
                cells += [_shown(speed[who], 1), _with_quartiles(ratio[who])]
            cells += [
                _shown(speed[TWIN], 1),
                _shown(rows[-1]["convit_over_twin_time"], 2),
                *(_shown(memory[who], 0) for who in (own, TIMM, AUTOCAST)),
                _shown(rows[-1]["share_of_matmul_peak"], 2),
            ]
            body.append(cells)
            if speed[COMPILED]:
                after.append(
                    f"{name}: timm's ConViT under torch.compile makes {speed[COMPILED]:.1f} "
                    f"images/s, ours {_with_quartiles(ratio[COMPILED])} times that."
                )
    after.insert(
        0,
        "Speeds are medians of the turns. A ratio is the median of the rounds' ratios of ours to "
        "the other side, with its quartiles. Peak memory is that of the process. Ours includes "
        "what its workers hold in the end. Autocast and oneDNN bf16 are timm's ConViT.",
    )
    kept = [i for i in range(len(head)) if not body or any(cells[i] != "-" for cells in body)]
    whole = (head, ["---"] * len(head), *body)
    lines = [f"| {' | '.join(cells[i] for i in kept)} |" for cells in whole]
    return "\n\n".join(["\n".join(lines), *after]) + "\n", rows


def _beside(own, groups, batch):
    """The turns of one of our sides, and {side: (images per second, quartiles of our ratio to it,
    peak memory)} of all that took turns with it."""
    turns, found = 0, {}
    for group in groups:
        ours = group.get(own, {}).get("seconds")
        if not ours:
            continue
        turns = turns or len(ours)
        for who, side in group.items():
            if "error" not in side and who not in found:
                ratios = np.divide(side["seconds"], ours)
                quartiles = [float(q) for q in np.quantile(ratios, (0.5, 0.25, 0.75))]
                found[who] = batch / median(side["seconds"]), quartiles, side.get("peak_memory_mb")
    return turns, found


def _troubles(name, result):
    """What a reader of a row must know: sides that failed, rounds beside other programs."""
    for who, side in result["found"].items():
        if "error" in side:
            yield f"{name}, {who}: {side['error']}"
    if result.get("disturbed"):
        yield (
            f"{name}: other programs took more than {100 * BUSY:.0f} % of the cores' time in "
            f"{result['disturbed']} of the rounds of {', '.join(result['found'])}, after {REPEATS} "
            "repeats."
        )


def _shown(number, digits):
    return "-" if number is None else f"{number:.{digits}f}"


def _with_quartiles(ratio):
    middle, low, high = (_shown(number, 2) for number in ratio)
    return middle if middle == "-" else f"{middle} ({low} to {high})"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--minutes", default=2.0, show_default=True, help="For a group; three rounds at least."
)
@click.option("--only", default="", help="Only rows whose name contains this text.")
@click.option("--without", multiple=True, help="Leave one side out, such as 'deit'.")
def main(folder, minutes, only, without):
    """Measures what is missing in FOLDER/measurements.jsonl, then writes the table."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "measurements.jsonl"
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(r["row"], tuple(r["found"])) for r in results}
    threads = available_threads()
    refused = _refusal() if BF16 not in without else None
    if refused:
        without = (*without, BF16)
        print(refused, flush=True)
    for name, variant, batch, mode, groups in plan():
        for group in groups:
            sides = tuple(who for who in group if who not in without)
            if only not in name or (name, sides) in done or len(sides) < 2:
                continue
            result = measure(sides, (variant, batch, mode, threads), 60.0 * minutes)
            results.append({"row": name, **result})
            with log.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
            speeds = (
                f"{who} {batch / median(side['seconds']):.1f}" if side.get("seconds") else who
                for who, side in result["found"].items()
            )
            print(f"{name}: {', '.join(speeds)}", flush=True)
    text, rows = table(results)
    text += f"\n{refused}\n" if refused else ""
    versions = (side.get("versions", {}) for r in results for side in r["found"].values())
    blas = next((lib for lib in threadpool_info() if lib["user_api"] == "blas"), {})
    about = {
        "cpu": _cpu(),
        "threads": threads,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba_version() or "none, so no kernels",
        "blas": f"{blas.get('internal_api')} {blas.get('version')} {blas.get('architecture')}",
        **next(filter(None, versions), {}),
    }
    (folder / "table.json").write_text(json.dumps({"about": about, "rows": rows}, indent=2) + "\n")
    facts = "".join(f"- {key}: {value}\n" for key, value in about.items())
    (folder / "table.md").write_text(f"{text}\n{facts}")
    print(text)


def _refusal():
    """The sentence on what is missing for bf16 on this machine, or None."""
    try:
        check_precision("bf16", np)
    except UserError as error:
        return f"Ours in bf16 is left out: {error}."


def _cpu():
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
