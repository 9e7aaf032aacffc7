"""CUDA against the CPU for correctness, then against timm's ConViT on PyTorch for speed, then
CIFAR-10 by the recipe cifar10-gpu.

    pip install '.[cuda13,bench]'
    python benchmarks/cuda.py FOLDER [--minutes 8] [--data-dir DATA]

Start it again until it says that all is done: a run stops before its time is over and the next one
picks up where it stopped, on the same machine and versions. The checks come first, and nothing is
measured where one fails (exit status 1). Then the most telling rows come first, and what is left of
the time goes to CIFAR-10, which a later run goes on with. Every result is appended to results.jsonl
at once; table.md and table.json are written from that file.

A check compares the device with the CPU in the same precision, relative in the norm: every case of
every layer (output and gradients, by CuPy's own functions) and the gradients of a whole model (by
the kernels) to 1e-10 in float64 and 1e-5 in float32, the losses of ten training steps to 1e-8 and
1e-3. With products in TF32 and bf16 the gradients are compared with float32's, to 4e-3 and 3e-2. A
step as a graph must give the bits of the step without.

A measurement is the median time of whole training steps on random images that lie on the device,
each step waited for, after a warm-up, all in one process. Ours is a graph where one can be
recorded; the peer updates by AdamW(fused=True). Memory is what each holds of the device's.

No figure in this repository comes from this script yet: it has run on a stand-in for CuPy only.
"""

import gc
import json
import os
import signal
import threading
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import click
import numpy as np

import miniconvit as mc
from miniconvit.arrays import to_cpu, to_device
from miniconvit.config import VARIANTS
from miniconvit.engine.cuda import check_precision, examine_cuda, resolve_device
from miniconvit.engine.gpu import DeviceEngine
from miniconvit.engine.objective import Classification
from miniconvit.engine.threads import Engine
from miniconvit.gradcheck.cases import CASES, FUNCTIONS
from miniconvit.training.interrupt import Diverged, Interrupted
from miniconvit.training.loop import train
from miniconvit.training.settings import make_settings

CHECKED_MODEL = "convit_mini32"
TOLERANCES = {"float64": (1e-10, 1e-8), "float32": (1e-5, 1e-3)}  # of tensors, of losses
WARM_UP = 5  # steps
SECONDS = 4.0  # of steps, for each measurement, and at least MIN_STEPS of them
MIN_STEPS = 10
SHAPES = {  # row: variant, batch, the peer's heads
    "Ti 32x32 / 4": ("tiny32", 512, 4),
    "Ti 224x224 / 16": ("tiny", 128, 4),
    "S 224x224 / 16": ("small", 128, 9),
}
OURS, TWIN = "miniconvit", "miniconvit's ViT twin"
PRECISIONS = {"bf16": "bf16", "TF32": "tf32", "fp32": "float32"}  # the tables' names: ours
REDUCED = {"tf32": 8 * 2.0**-11, "bf16": 8 * 2.0**-8}  # eight roundings of an operand
RECIPE = "cifar10-gpu"
CIFAR = f"CIFAR-10 by {RECIPE}"
LEAST_OF_CIFAR = 1.0  # minutes for which it is begun or gone on with
MARGIN = 20.0  # seconds in which it is saved


def plan():
    """(name, function of the module xp, minutes to keep for it), in order."""
    for dtype in TOLERANCES:
        for layer in CASES:
            yield f"check {layer} {dtype}", partial(check_layer, layer, dtype), 0.5
        yield f"check the model's gradients {dtype}", partial(check_model, dtype), 1.0
        yield f"check ten losses {dtype}", partial(check_losses, dtype), 1.0
    for precision in REDUCED:
        check = partial(check_model, "float32", precision=precision)
        yield f"check the model's gradients {precision}", check, 1.0
    for precision in PRECISIONS.values():
        yield f"check the graph {precision}", partial(check_graph, precision), 1.0
    for row in SHAPES:
        for precision in PRECISIONS:
            yield _ours(row, precision)
            yield _peer(row, "eager", precision)
        yield _twin(row, "bf16")
    yield from (_peer(row, "compile", "bf16") for row in SHAPES)
    yield CIFAR, None, LEAST_OF_CIFAR
    for row in SHAPES:
        yield from (_peer(row, "compile", precision) for precision in ("TF32", "fp32"))
        yield from (_twin(row, precision) for precision in ("TF32", "fp32"))


def _ours(row, precision, name="convit", called=OURS):
    variant, batch, _ = SHAPES[row]
    function = partial(measure_ours, f"{name}_{variant}", batch, PRECISIONS[precision])
    return f"{row}: {called} {precision}", function, 0.5


def _twin(row, precision):
    return _ours(row, precision, "vit", TWIN)


def _peer(row, how, precision):
    variant, batch, heads = SHAPES[row]
    function = partial(measure_timm, f"convit_{variant}", batch, heads, how, precision)
    return f"{row}: timm {how} {precision}", function, 0.5 if how == "eager" else 2.5


# Checks: each returns {"error", "tolerance", "worst"}.


def check_layer(layer, dtype, xp):
    """Output and gradients of every case of a layer, on the CPU and on the device."""
    sent = SimpleNamespace(**{name: _sent(item, xp) for name, item in vars(FUNCTIONS).items()})
    pairs = [CASES[layer](np.random.default_rng(0), functions) for functions in (FUNCTIONS, sent)]
    found = {}
    for number, (true, case) in enumerate(zip(*pairs, strict=True), 1):
        errors = _errors(_run_case(case, dtype, xp), _run_case(true, dtype, np))
        found |= {f"{name}, case {number}": error for name, error in errors.items()}
    return _verdict(found, TOLERANCES[dtype][0])


def _sent(function, xp):
    """The same function, which sends its arguments to the device."""
    return lambda *args, **kwargs: function(*to_device(args, xp), **to_device(kwargs, xp))


def _run_case(case, dtype, xp):
    """The outputs and the gradients of one case, on the CPU, by name."""
    inputs = {name: value.astype(dtype) for name, value in case.inputs.items()}
    y, cache = case.forward(**to_device(inputs, xp))
    rng = np.random.default_rng(1)
    outputs = y if isinstance(y, tuple) else (y,)
    dys = tuple(np.asarray(rng.standard_normal(part.shape), dtype) for part in outputs)
    grads = case.backward(to_device(dys if isinstance(y, tuple) else dys[0], xp), cache)
    if not isinstance(grads, dict):
        grads = dict(zip(inputs, grads if isinstance(grads, tuple) else (grads,), strict=False))
    return to_cpu({f"output {i}": part for i, part in enumerate(outputs)} | grads)


def check_model(dtype, xp, precision="float32"):
    """The gradient of every parameter of a whole model in training mode."""
    check_precision(precision, xp)
    true, found = (_train(dtype, module, 1, precision)[1] for module in (np, xp))
    tolerance = REDUCED.get(precision, TOLERANCES[dtype][0])
    return _verdict(_errors(found, true), tolerance)


def check_graph(precision, xp):
    """Parameters after eight whole steps as a graph, and without; where none can be recorded, the
    reason is told."""
    check_precision(precision, xp)
    found = {}
    for records in (False, True):
        config, images, labels, params = _drawn("float32", xp)
        engine = DeviceEngine(Classification(config, 0.1), xp, precision)
        engine.records, optimizer = records, mc.AdamW(params)
        engine.hold(params, optimizer, max_norm=0.5)
        for number in range(8):
            engine.step(lambda *_, b=(images, labels): b, 16, 1e-3, 0, number)
        found[records] = to_cpu(params)
    verdict = _verdict(_errors(found[True], found[False]), 0.0)
    if engine.graph_problem:
        verdict["worst"] = f"none was recorded: {engine.graph_problem}"
    return verdict


def check_losses(dtype, xp):
    """The losses of ten training steps."""
    true, found = (_train(dtype, module, 10)[0] for module in (np, xp))
    pairs = zip(found, true, strict=True)
    errors = {f"step {i}": abs(a - b) / abs(b) for i, (a, b) in enumerate(pairs, 1)}
    return _verdict(errors, TOLERANCES[dtype][1])


def _drawn(dtype, xp):
    """The checked model's config, random images and labels, and parameters."""
    config = replace(VARIANTS[CHECKED_MODEL], drop_path_rate=0.1)
    rng = np.random.default_rng(2)
    images = rng.standard_normal((16, config.in_chans, *config.image)).astype(dtype)
    labels = rng.integers(config.num_classes, size=16)
    params = mc.init_params(config, dtype=dtype)
    return config, *to_device((images, labels, params), xp)


def _train(dtype, xp, steps, precision="float32"):
    """(losses, gradients of the last step, on the CPU) of a few steps with random images."""
    config, images, labels, params = _drawn(dtype, xp)
    optimizer, losses = mc.AdamW(params, lr=1e-3), []
    objective = Classification(config, 0.1)
    with Engine(objective) if xp is np else DeviceEngine(objective, xp, precision) as engine:
        for step in range(steps):
            loss, _, grads = engine.loss_and_grads(
                lambda a, b: (images[a:b], labels[a:b]), 16, params, 0, step
            )
            optimizer.step(params, grads)
            losses.append(float(loss))
    return losses, to_cpu(grads)


def _errors(found, true):
    """Relative error of each tensor in the norm; of one that vanishes, against the largest."""
    norms = {
        name: float(np.linalg.norm(value)) for name, value in true.items() if value is not None
    }
    largest = max(norms.values())
    return {
        name: float(np.linalg.norm(found[name] - true[name]))
        / (largest if norm < 1e-6 * largest else norm)
        for name, norm in norms.items()
    }


def _verdict(errors, tolerance):
    worst = max(errors, key=lambda name: (np.isnan(errors[name]), errors[name]))
    return {"error": errors[worst], "tolerance": tolerance, "worst": worst}


# Measurements: each returns {"images_per_second", "step_ms_median", "peak_memory_mb", "steps"}.


def measure_ours(name, batch, precision, xp):
    """Whole training steps by our kernels."""
    check_precision(precision, xp)
    config = VARIANTS[name]
    rng = np.random.default_rng(0)
    images = rng.standard_normal((batch, config.in_chans, *config.image), dtype="float32")
    labels = rng.integers(config.num_classes, size=batch)
    images, labels, params = to_device((images, labels, mc.init_params(config)), xp)
    with DeviceEngine(Classification(config), xp, precision) as engine:
        engine.hold(params, mc.AdamW(params))

        def step(number):
            engine.step(lambda a, b: (images[a:b], labels[a:b]), batch, 1e-3, 0, number)

        taken = _times(step, engine.wait)
        found = _speed(taken, batch, 2**20 * engine.memory_mb())
    return found | ({"no graph": engine.graph_problem} if engine.graph_problem else {})


def measure_timm(name, batch, heads, how, precision, xp):
    """A training step of timm's ConViT: eager or compiled; fp32, TF32 or bf16 autocast."""
    try:
        import timm  # noqa: F401
        import torch
    except ImportError as error:
        return {"skipped": f"{error.name} is not installed"}
    if not torch.cuda.is_available():
        return {"skipped": "PyTorch finds no GPU"}
    torch.cuda.reset_peak_memory_stats()
    taken = time_timm(VARIANTS[name], batch, heads, how, precision, "cuda")
    found = _speed(taken, batch, torch.cuda.max_memory_reserved())
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    return found


def time_timm(config, batch, heads, how, precision, device):
    """Seconds of each counted step of timm's ConViT on a PyTorch device."""
    import torch
    from timm.models.convit import ConVit

    torch.set_float32_matmul_precision("high" if precision == "TF32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "TF32"
    torch.manual_seed(0)
    model = ConVit(
        img_size=config.image[0], patch_size=config.patch[0], num_classes=config.num_classes,
        embed_dim=config.embed_dim // heads, depth=config.depth, num_heads=heads,
        local_up_to_layer=config.local_up_to_layer, qkv_bias=config.qkv_bias,
        drop_path_rate=config.drop_path_rate,
    ).to(device)  # fmt: skip
    forward = torch.compile(model) if how == "compile" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    loss_of = torch.nn.CrossEntropyLoss()
    images = torch.randn(batch, config.in_chans, *config.image, device=device)
    labels = torch.randint(config.num_classes, (batch,), device=device)

    def step(number):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of(forward(images), labels)
        loss.backward()
        optimizer.step()

    return _times(step, torch.cuda.synchronize if device == "cuda" else bool)


def _times(step, wait):
    """Seconds of each counted step."""
    taken = []
    while len(taken) < WARM_UP + MIN_STEPS or sum(taken[WARM_UP:]) < SECONDS:
        began = time.perf_counter()
        step(len(taken))
        wait()
        taken.append(time.perf_counter() - began)
    return taken[WARM_UP:]


def _speed(taken, batch, peak):
    return {
        "images_per_second": batch / median(taken),
        "step_ms_median": 1000 * median(taken),
        "peak_memory_mb": peak / 2**20,
        "steps": len(taken),
    }


# CIFAR-10, in what is left of the time.


def train_cifar(folder, data_dir, seconds):
    """Trains by the recipe cifar10-gpu for so many seconds, or goes on with it. Returns what is
    reached, with "left", or "failed"."""
    gc.collect()
    asked_to_stop = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    left = True
    try:
        asked_to_stop.start()
        train(make_settings(RECIPE), folder, resume=True, data_dir=data_dir, download=False,
              device="cuda", quiet=True)  # fmt: skip
        left = False
    except (Interrupted, KeyboardInterrupt):
        pass
    except (mc.UserError, Diverged) as error:
        return {"failed": str(error)}
    finally:
        asked_to_stop.cancel()
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    rows = [json.loads(line) for line in lines]
    if not rows:
        return {"left": True, "epochs": 0}
    speeds = [row["images_per_second"] for row in rows]
    return {
        "left": left,
        "epochs": rows[-1]["epoch"],
        "best_val_top1": max(row["val_top1"] for row in rows),
        "images_per_second": median(speeds),
        "seconds": sum(row["seconds"] for row in rows),
    }


# The results file and the tables.


def machine():
    """What the results belong to: GPU, driver and versions."""
    found = examine_cuda()
    about = {key: found[key] for key in ("gpu", "cuda_driver", "cupy")}
    for name in ("torch", "timm"):
        try:
            about[name] = version(name)
        except PackageNotFoundError:
            about[name] = None
    return about


def read_results(file, about):
    """({item: result}, {item: times begun}) of this machine."""
    results, begun = {}, {}
    for line in file.read_text().splitlines() if file.exists() else ():
        record = json.loads(line)
        if record["machine"] == about:
            item = record["item"]
            if "result" in record:
                results[item] = record["result"]
            else:
                begun[item] = begun.get(item, 0) + 1
    return results, begun


def passed(result):
    """Whether a check holds; a failed one has an error above its tolerance, or none at all."""
    return "skipped" in result or result.get("error", np.inf) <= result.get("tolerance", 0.0)


def attempt(function, xp):
    """The result of one item; what it raises is a result too."""
    try:
        return function(xp)
    except mc.UserError as error:  # of a precision that this GPU has not
        return {"skipped": str(error)}
    except Exception as error:  # one row must not stop the others
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def table(results, about):
    """The results as Markdown, without what has not been reached."""
    lines = ["; ".join(f"{key}: {value}" for key, value in about.items()), ""]
    lines += ["| check | error | at most | worst | |", "| --- | --- | --- | --- | --- |"]
    for item, result in results.items():
        if item.startswith("check "):
            cells = result.get("failed") or result.get("skipped") or f"{result['error']:.1e}"
            cells += f" | {result.get('tolerance', '')} | {result.get('worst', '')}"
            verdict = "ok" if passed(result) else "**WRONG**"
            lines.append(f"| {item.removeprefix('check ')} | {cells} | {verdict} |")
    lines += ["", "| training step | images/s | ms | peak memory, MB | ours is faster by |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for item, result in results.items():
        if item.startswith("check ") or item == CIFAR:
            continue
        if "step_ms_median" not in result:
            lines.append(f"| {item} | {result.get('skipped') or result.get('failed')} | | | |")
            continue
        row, precision = item.partition(":")[0], item.rpartition(" ")[2]
        ours = results.get(f"{row}: {OURS} {precision}", {}).get("images_per_second")
        speed = result["images_per_second"]
        cells = f"{speed:.0f} | {result['step_ms_median']:.2f} | {result['peak_memory_mb']:.0f}"
        lines.append(f"| {item} | {cells} | {f'{ours / speed:.2f}' if ours else ''} |")
    if found := results.get(CIFAR):
        lines += ["", f"{CIFAR}: {json.dumps(found)}"]
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--minutes", default=8.0, show_default=True, help="Greatest length of this run.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder of CIFAR-10.")
def main(folder, minutes, data_dir):
    """Checks, then measures; writes results.jsonl, table.md and table.json into FOLDER."""
    end = time.monotonic() + 60 * minutes
    os.environ.pop("CUPY_TF32", None)  # which would make float32's products TF32's
    try:
        xp, place = resolve_device("cuda")
    except mc.UserError as error:
        raise click.ClickException(str(error)) from error
    click.echo(place)
    folder.mkdir(parents=True, exist_ok=True)
    file, about = folder / "results.jsonl", machine()
    items = {name: (function, reserve) for name, function, reserve in plan()}
    results, begun = read_results(file, about)
    in_time = True
    with open(file, "a") as log:

        def note(**record):
            log.write(json.dumps({"machine": about} | record) + "\n")
            log.flush()

        for item, (function, reserve) in items.items():
            if item in results:
                continue
            if not item.startswith("check ") and not _all_checks_hold(results):
                break
            in_time = time.monotonic() + 60 * reserve <= end
            if not in_time:
                break
            if item == CIFAR:
                seconds = end - time.monotonic() - MARGIN
                results[item] = train_cifar(folder / "cifar10", data_dir, seconds)
                click.echo(f"{item}: {json.dumps(results[item])}")
                if results[item].get("left"):
                    break
                note(item=item, result=results[item])
                continue
            if begun.get(item, 0) >= 2:
                results[item] = {"failed": "was begun twice and never finished"}
            else:
                note(item=item)
                results[item] = attempt(function, xp)
            note(item=item, result=results[item])
            click.echo(f"{item}: {json.dumps(results[item])}")
    results = {item: results[item] for item in items if item in results}
    (folder / "table.md").write_text(table(results, about))
    (folder / "table.json").write_text(json.dumps(about | {"results": results}, indent=2) + "\n")
    if not _all_checks_hold(results):
        raise click.ClickException("a check failed: nothing is measured; see table.md")
    left = len(items) - len(results) + results.get(CIFAR, {}).get("left", False)
    click.echo("all is done" if not left else f"{left} items are left: start the script again")


def _all_checks_hold(results):
    return all(passed(result) for item, result in results.items() if item.startswith("check "))


if __name__ == "__main__":
    main()
