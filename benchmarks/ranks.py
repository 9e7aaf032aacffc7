"""What ranks cost: the exchange against MPI's own sum, and steps against one process.

mpirun -n 2 python benchmarks/ranks.py exchange     # in turns with Allreduce, the same bytes
python benchmarks/ranks.py steps                    # 2 ranks of a worker, 2 workers, in turns
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import click
import numpy as np

import miniconvit as mc
from miniconvit.engine import Classification, make_engine
from miniconvit.engine.ranks import complete, find_ranks
from miniconvit.optim import AdamW

ROOT = Path(__file__).parent.parent
WARM_UP = 3


@click.group()
def program():
    """Measures ranks."""


@program.command()
@click.option("--model", default="convit_tiny32", show_default=True)
@click.option("--turns", default=40, show_default=True)
def exchange(model, turns):
    """Milliseconds to add up a model's gradients: ours, in the tree's order, and Allreduce."""
    from mpi4py import MPI

    ranks, comm = find_ranks(), MPI.COMM_WORLD
    size = sum(int(np.prod(shape)) for shape in mc.param_shapes(mc.VARIANTS[model]).values())
    ranks.weigh(1)
    count = 4 * ranks.size  # pieces: a power of two for each rank, as in a usual batch
    (node,) = complete(ranks.share(count))
    x, out, y = (np.empty(size, "float32") for _ in range(3))
    found = {"ours": [], "Allreduce": []}
    for _ in range(WARM_UP + turns):
        for name, function in (
            ("ours", lambda: ranks.sum({node: x}, count, out)),
            ("Allreduce", lambda: comm.Allreduce(x, y)),
        ):
            x.fill(1)  # ours has used it up
            comm.Barrier()
            began = time.perf_counter()
            function()
            found[name].append(comm.allreduce(time.perf_counter() - began, MPI.MAX))
    assert (out == ranks.size).all() and (y == ranks.size).all()
    if ranks.rank == 0:
        ours, theirs = (1000 * median(times[WARM_UP:]) for times in found.values())
        ratio = median(
            a / b for a, b in zip(*(times[WARM_UP:] for times in found.values()), strict=True)
        )
        print(f"{size * 4 / 1e6:.1f} MB, {ranks.size} ranks, {MPI.get_vendor()[0]}, {turns} turns")
        print(f"ours {ours:.1f} ms, Allreduce {theirs:.1f} ms, ratio of a turn {ratio:.2f}")


@program.command()
@click.option("--model", default="convit_micro32", show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--turns", default=10, show_default=True)
@click.option("--steps", default=20, show_default=True, help="Steps of a turn.")
def steps(model, batch_size, turns, steps):
    """Images a second of two ranks of one worker, and of one process with two workers."""
    mpirun = [str(Path(sys.executable).with_name("mpirun"))]
    side = [sys.executable, __file__, "side", model, str(batch_size), str(steps)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    sides = {
        "one process, 2 workers": [*side, "2"],
        "2 ranks of 1 worker": [*mpirun, "-n", "2", *side, "1"],
    }
    found = {name: [] for name in sides}
    for turn in range(turns):
        order = list(sides) if turn % 2 else list(reversed(sides))
        for name in order:
            done = subprocess.run(
                sides[name], env=os.environ | {"PYTHONPATH": path}, capture_output=True, check=True
            )
            found[name].append([float(word) for word in done.stdout.split()])
    for name, rows in found.items():
        speed, cpu = (median(column) for column in zip(*rows, strict=True))
        print(f"{name}: {speed:.0f} images/s, {cpu:.1f} CPU ms a step")
    ratios = [theirs[0] / ours[0] for ours, theirs in zip(*found.values(), strict=True)]
    cpu = [ours[1] / theirs[1] for ours, theirs in zip(*found.values(), strict=True)]
    print(f"ranks / workers, median of {turns} turns: speed {median(ratios):.3f}, ", end="")
    print(f"steps per CPU time {median(cpu):.3f}")


@program.command(hidden=True)
@click.argument("model")
@click.argument("batch_size", type=int)
@click.argument("count", type=int)
@click.argument("workers", type=int)
def side(model, batch_size, count, workers):
    """Prints images a second (of the median step) and CPU milliseconds a step."""
    ranks, config, rng = find_ranks(), mc.VARIANTS[model], np.random.default_rng(0)
    images = rng.standard_normal((batch_size, config.in_chans, *config.image), dtype="float32")
    labels, params = rng.integers(config.num_classes, size=batch_size), mc.init_params(config)
    optimizer, taken = AdamW(params), []
    with ranks.guard(), make_engine(Classification(config), np, workers, ranks=ranks) as engine:
        ranks.weigh(workers)
        engine.hold(params, optimizer)
        for step in range(WARM_UP + count):
            if step == WARM_UP:
                cpu = cpu_seconds(engine)
            began = time.perf_counter()
            _, _, grads = engine.loss_and_grads(
                lambda a, b: (images[a:b], labels[a:b]), batch_size, params, step=step
            )
            engine.update(optimizer, params, grads)
            taken.append(time.perf_counter() - began)
        cpu = sum(ranks.all(cpu_seconds(engine) - cpu))
    if ranks.rank == 0:
        print(batch_size / median(taken[WARM_UP:]), 1000 * cpu / count)


def cpu_seconds(engine):
    """What this process and its workers have used so far."""
    ticks = 0
    for pid in (os.getpid(), *getattr(engine, "_workers", {}).values()):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    program()
