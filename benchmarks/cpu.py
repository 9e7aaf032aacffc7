"""The training step and inference on a CPU against timm's ConViT and DeiT on PyTorch.

    pip install '.[bench]'
    python benchmarks/cpu.py benchmarks/results/cpu [--rounds 3] [--seconds 20] [--only TEXT]

Every measurement is a process of its own (so its peak memory is its own); ours and the peer's take
turns, round after round, on as many cores, and the ratio of a row is the median of the rounds'
ratios. Nothing else should run on the machine. Each measurement is appended to measurements.jsonl
as soon as it is made and is not repeated when the script is started again; table.md and table.json
are written from that file.
"""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import click
import numpy as np
from threadpoolctl import threadpool_info

from miniconvit.config import VARIANTS
from miniconvit.model import param_shapes
from miniconvit.parallel import available_threads

PEER = Path(__file__).parent / "cpu_peer.py"
SHAPES = {  # row's name: our variant, image, patch, the peer's size
    "Ti 32x32 / 4": ("tiny32", 32, 4, "tiny"),
    "Ti 224x224 / 16": ("tiny", 224, 16, "tiny"),
    "S 224x224 / 16": ("small", 224, 16, "small"),
}
OURS, TWIN, TIMM, DEIT, COMPILED = "ours", "our ViT twin", "timm ConViT", "timm DeiT", "compiled"


def plan():
    """(name, shape, batch, mode) of every row, the most telling ones first."""
    for mode in ("train", "infer"):
        for batch in (16, 128):
            for name, shape in SHAPES.items():
                yield f"{name}, batch {batch}, {mode}", shape, batch, mode


def command(who, shape, batch, mode, seconds, threads):
    """The command line that measures one side of a row."""
    variant, img_size, patch_size, size = shape
    if who in (OURS, TWIN):
        model = f"{'convit' if who == OURS else 'vit'}_{variant}"
        code = "from miniconvit.cli import main; main()"
        steps = max(2, round(seconds / _guess(variant, batch, mode)))
        line = [sys.executable, "-c", code, "bench", "--model", model, "--device", "cpu", "--json"]
        line += ["--batch-size", str(batch), "--steps", str(steps), "--threads", str(threads)]
        return line + (["--inference"] if mode == "infer" else [])
    kind = "deit" if who == DEIT else "convit"
    how = "compile" if who == COMPILED else "eager"
    arguments = (kind, img_size, patch_size, size, batch, mode, seconds, threads, how)
    return [sys.executable, str(PEER), *map(str, arguments)]


def _guess(variant, batch, mode):
    """About how many seconds one of our steps takes, to choose how many fill the time."""
    images_per_second = {"tiny32": 75.0, "tiny": 18.0, "small": 5.0}[variant]
    return batch / images_per_second / (3 if mode == "infer" else 1)


def measure(line):
    """The JSON that a measurement prints, or {"error": its last line}."""
    path = str(Path(__file__).parent.parent)
    found = os.environ.get("PYTHONPATH")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([path, found] if found else [path])}
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed, probably for want of memory"])[-1]
        return {"error": f"exit {done.returncode}: {last[:200]}"}
    return json.loads(done.stdout.strip().splitlines()[-1] if "\n{" in done.stdout else done.stdout)


def matmul_peak():
    """GFLOP/s of large float32 products on all threads: what the machine gives through NumPy."""
    a = np.ones((4096, 4096), "float32")
    a @ a
    best = min(_timed(lambda: a @ a) for _ in range(5))
    return 2 * 4096**3 / best / 1e9


def _timed(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


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


def table(results, peak):
    """The Markdown table and its rows as dicts."""
    lines = [
        "| row | ours, images/s | timm ConViT | ratio | timm DeiT | ratio | our ViT twin | "
        "ConViT / twin time | peak memory, MB: ours | timm | of matmul peak |",
        "| --- " * 11 + "|",
    ]
    found = []
    for name, shape, _, mode in plan():
        rounds = [r for r in results if r["row"] == name]

        def speed(who, key="images_per_second", rounds=rounds):
            values = [r["found"][key] for r in rounds if r["who"] == who and key in r["found"]]
            return median(values) if values else None

        def ratios(who, rounds=rounds):
            by_round = {(r["who"], r["round"]): r["found"].get("images_per_second") for r in rounds}
            pairs = [
                by_round[OURS, i] / value
                for (other, i), value in by_round.items()
                if other == who and value and by_round.get((OURS, i))
            ]
            return sorted(pairs)

        def ratio(who, ratios=ratios):
            return median(ratios(who)) if ratios(who) else None

        if speed(OURS) is None:
            continue
        twin = ratio(TWIN)
        row = {
            "row": name,
            "ours": speed(OURS),
            "timm_convit": speed(TIMM),
            "ratio": ratio(TIMM),
            "ratio_rounds": ratios(TIMM),
            "timm_deit": speed(DEIT),
            "ratio_deit": ratio(DEIT),
            "twin": speed(TWIN),
            "convit_over_twin_time": 1 / twin if twin else None,
            "peak_memory_mb": speed(OURS, "peak_memory_mb"),
            "timm_peak_memory_mb": speed(TIMM, "peak_memory_mb"),
            "share_of_matmul_peak": speed(OURS) * step_gflop(shape[0], mode) / peak,
            "timm_compiled": speed(COMPILED),
            "ratio_compiled": ratio(COMPILED),
        }
        found.append(row)
        cells = [row["ours"], row["timm_convit"], row["ratio"], row["timm_deit"]]
        cells += [row["ratio_deit"], row["twin"], row["convit_over_twin_time"]]
        digits = (1, 1, 2, 1, 2, 1, 2)
        texts = ["-" if c is None else f"{c:.{d}f}" for c, d in zip(cells, digits, strict=True)]
        if len(pairs := row["ratio_rounds"]) > 1:
            texts[2] += f" ({pairs[0]:.2f} to {pairs[-1]:.2f})"
        texts += [
            "-" if row[key] is None else f"{row[key]:.0f}"
            for key in ("peak_memory_mb", "timm_peak_memory_mb")
        ]
        lines.append(f"| {name} | {' | '.join(texts)} | {row['share_of_matmul_peak']:.2f} |")
    lines.append(
        "\nMedians of the rounds; a ratio is the median of the rounds' ratios, with the lowest and "
        "the highest. Peak memory: of the process; ours with what its workers hold in the end."
    )
    compiled = [row for row in found if row["timm_compiled"]]
    lines += [
        f"\n{row['row']}: timm's ConViT under torch.compile {row['timm_compiled']:.1f} images/s, "
        f"ours {row['ratio_compiled']:.2f} times that."
        for row in compiled
    ]
    errors = {(r["row"], r["who"], r["found"]["error"]) for r in results if "error" in r["found"]}
    lines += [f"\n{row}, {who}: {error}" for row, who, error in sorted(errors)]
    return "\n".join(lines) + "\n", found


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=20.0, show_default=True, help="Of counted steps a measurement.")
@click.option("--only", default="", help="Only rows whose name contains this text.")
@click.option("--without", multiple=True, help="Leave one side out, such as 'timm DeiT'.")
def main(folder, rounds, seconds, only, without):
    """Measures what is missing in FOLDER/measurements.jsonl, then writes the table."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "measurements.jsonl"
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(r["row"], r["who"], r["round"]) for r in results}
    threads = available_threads()
    for number in range(rounds):
        for name, shape, batch, mode in plan():
            sides = [OURS, TIMM, TWIN, DEIT]
            if name.startswith("Ti 32x32") and mode == "train" and batch == 128:
                sides.append(COMPILED)
            for who in sides:
                if only not in name or who in without or (name, who, number) in done:
                    continue
                found = measure(command(who, shape, batch, mode, seconds, threads))
                result = {"row": name, "who": who, "round": number, "found": found}
                results.append(result)
                with log.open("a") as file:
                    file.write(json.dumps(result) + "\n")
                shown = found.get("images_per_second")
                print(f"round {number} {name} {who}: {shown and round(shown, 1)}", flush=True)
    peak = matmul_peak()
    text, found = table(results, peak)
    versions = next((r["found"]["versions"] for r in results if "versions" in r["found"]), {})
    blas = next((lib for lib in threadpool_info() if lib["user_api"] == "blas"), {})
    about = {
        "cpu": _cpu(),
        "threads": threads,
        "matmul_peak_gflops": round(peak, 1),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": f"{blas.get('internal_api')} {blas.get('version')} {blas.get('architecture')}",
        "rounds, at most": max((r["round"] + 1 for r in results), default=0),
        **versions,
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
