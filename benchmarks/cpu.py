"""The training step and inference on a CPU against timm's ConViT and DeiT on PyTorch.

    pip install '.[bench]'
    python benchmarks/cpu.py FOLDER [--minutes 2] [--only TEXT] [--without SIDE]

Every side of a row is a process of its own (so its peak memory is its own) on as many cores, and
all of them live as long as the row: they take turns of about a second, forwards and backwards, so
that a machine that changes its speed changes it for all. A ratio is the median of the turns'
ratios. Nothing else should run. Each group of a row is appended to FOLDER/measurements.jsonl as
soon as it is measured and is not repeated when the script is started again; table.md and table.json
are written from that file.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import click
import numpy as np
from cpu_side import MATMUL_GFLOP
from threadpoolctl import threadpool_info

from miniconvit.config import VARIANTS
from miniconvit.model import param_shapes
from miniconvit.system import available_threads

ROOT = Path(__file__).parent.parent
SHAPES = {"Ti 32x32 / 4": "tiny32", "Ti 224x224 / 16": "tiny", "S 224x224 / 16": "small"}
OURS, TIMM, TWIN, DEIT, COMPILED = "ours", "convit", "twin", "deit", "compiled"
MATMUL = "matmul"  # nothing but matrix products: what the machine gives at that moment
TURN = 1.0  # second: shorter steps are repeated, and the first one, with a cold cache, not counted
PAUSE = 0.25  # seconds before a turn, in which the threads of the last one stop waiting for work
MIN_ROUNDS = 3


def plan():
    """(name, variant, batch, mode, groups of sides) of every row, the most telling ones first.
    The second group is beside ours again: the memory of all at once may be too much."""
    for mode in ("train", "infer"):
        for batch in (16, 128):
            for name, variant in SHAPES.items():
                compiled = (variant, batch, mode) == ("tiny32", 128, "train")
                groups = (OURS, TIMM, TWIN, MATMUL), (OURS, DEIT, *([COMPILED] if compiled else []))
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


def measure(sides, arguments, seconds):
    """{side: its turns' seconds and facts, or {"error": why there are none}}."""
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
            if (ask(Side.step, who) or TURN) < TURN:
                ask(Side.step, who)
        began, rounds = time.perf_counter(), 0
        while running and (rounds < MIN_ROUNDS or time.perf_counter() - began < seconds):
            for who in list(running)[:: 1 if rounds % 2 else -1]:
                taken = ask(Side.turn, who)
                if taken:
                    found[who]["seconds"].append(taken)
            rounds += 1
        for who in list(running):
            found[who] |= running[who].facts()
    return found


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
    """The Markdown table and its rows as dicts."""
    lines = [
        "| row | ours, images/s | timm ConViT | ratio | timm DeiT | ratio | our ViT twin | "
        "ConViT / twin time | peak memory, MB: ours | timm | of matmul peak |",
        "| --- " * 11 + "|",
    ]
    rows, after = [], []
    for name, variant, batch, mode, _ in plan():
        groups = [result["found"] for result in results if result["row"] == name]
        found = {}  # side: (images per second, quartiles of the ratio to it, peak memory)
        for group in groups:
            for who, side in group.items():
                if "error" in side:
                    after.append(f"{name}, {who}: {side['error']}")
                elif group[OURS].get("seconds") and who not in found:
                    ratios = np.divide(side["seconds"], group[OURS]["seconds"])
                    quartiles = [float(q) for q in np.quantile(ratios, (0.5, 0.25, 0.75))]
                    speed = batch / median(side["seconds"])
                    found[who] = speed, quartiles, side.get("peak_memory_mb")
        if OURS not in found:
            continue
        nothing = None, [None] * 3, None
        speed, ratio, memory = (
            {who: found.get(who, nothing)[i] for who in (OURS, TIMM, TWIN, DEIT, COMPILED, MATMUL)}
            for i in range(3)
        )
        share = batch * step_gflop(variant, mode) / MATMUL_GFLOP  # of one large product
        rows.append({
            "row": name,
            "turns": len(groups[0][OURS]["seconds"]),
            "images_per_second": speed,
            "ratio": {who: ratio[who] for who in (TIMM, TWIN, DEIT, COMPILED)},
            "convit_over_twin_time": ratio[TWIN][0] and 1.0 / ratio[TWIN][0],
            "peak_memory_mb": memory,
            "share_of_matmul_peak": ratio[MATMUL][0] and share * ratio[MATMUL][0],
        })  # fmt: skip
        cells = [
            name,
            _shown(speed[OURS], 1),
            _shown(speed[TIMM], 1),
            _with_quartiles(ratio[TIMM]),
            _shown(speed[DEIT], 1),
            _with_quartiles(ratio[DEIT]),
            _shown(speed[TWIN], 1),
            _shown(rows[-1]["convit_over_twin_time"], 2),
            _shown(memory[OURS], 0),
            _shown(memory[TIMM], 0),
            _shown(rows[-1]["share_of_matmul_peak"], 2),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        if speed[COMPILED]:
            after.append(
                f"{name}: timm's ConViT under torch.compile makes {speed[COMPILED]:.1f} images/s, "
                f"ours {_with_quartiles(ratio[COMPILED])} times that."
            )
    after.insert(
        0,
        "Speeds are medians of the turns. A ratio is the median of the rounds' ratios of ours to "
        "the other side, with its quartiles. Peak memory is that of the process. Ours includes "
        "what its workers hold in the end.",
    )
    return "\n\n".join(["\n".join(lines), *after]) + "\n", rows


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
    for name, variant, batch, mode, groups in plan():
        for group in groups:
            sides = tuple(who for who in group if who not in without)
            if only not in name or (name, sides) in done or len(sides) < 2:
                continue
            found = measure(sides, (variant, batch, mode, threads), 60.0 * minutes)
            results.append({"row": name, "found": found})
            with log.open("a") as file:
                file.write(json.dumps(results[-1]) + "\n")
            speeds = (
                f"{who} {batch / median(side['seconds']):.1f}" if side.get("seconds") else who
                for who, side in found.items()
            )
            print(f"{name}: {', '.join(speeds)}", flush=True)
    text, found = table(results)
    versions = (side.get("versions", {}) for r in results for side in r["found"].values())
    blas = next((lib for lib in threadpool_info() if lib["user_api"] == "blas"), {})
    about = {
        "cpu": _cpu(),
        "threads": threads,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas.get('internal_api')} {blas.get('version')} {blas.get('architecture')}",
        **next(filter(None, versions), {}),
    }
    (folder / "table.json").write_text(json.dumps({"about": about, "rows": found}, indent=2) + "\n")
    facts = "".join(f"- {key}: {value}\n" for key, value in about.items())
    (folder / "table.md").write_text(f"{text}\n{facts}")
    print(text)


def _cpu():
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
