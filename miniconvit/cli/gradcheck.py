"""`miniconvit gradcheck`: every gradient of the library, proven before your eyes."""

from math import isfinite

import click

from ..gradcheck.cases import ALL_CASES, CASES, PARTS, catch, check_layer
from ..gradcheck.mutants import MUTANTS, NEIGHBOUR_MUTANTS
from ..gradcheck.neighbours import NEIGHBOURS
from ..training.report import folded
from .options import RUN, Command, Name, json_option, option, print_json, setting_option


@click.command("gradcheck", cls=Command)
@option(
    "--layer",
    type=Name(ALL_CASES),
    help=f"Check this layer alone. The names are {', '.join(CASES)}. Those of the papers beside "
    f"ConViT are {', '.join(NEIGHBOURS)}.",
    shown="all of the part",
)
@option(
    "--part",
    type=Name(PARTS),
    default="lesson",
    help="Check ConViT itself, or the papers beside it.",
    shown="lesson",
)
@option("--mutants", is_flag=True, help="Plant known bugs, and show which of them are caught.")
@option("--every-entry", is_flag=True, help="Check every entry of every tensor. This is slow.")
@setting_option("seed", "Random seed of the inputs and the parameters.", default=0, group=RUN)
@json_option
def command(layer, part, mutants, every_entry, seed, as_json):
    """Check every backward pass.

    It compares each gradient with central differences in float64, and prints a row for each tensor.
    A row says ok, WRONG, or unsure where differences cannot tell. It says zero where the gradient
    vanishes exactly, as that of pos_proj.bias must. On a terminal, rows that are not right are red.

    The exit code is 1 where a row is not right, or where a bug of --mutants is not caught.
    """
    layers = PARTS[part] if layer is None else (layer,)
    run = _kill_table if mutants else _layer_tables
    return 0 if run(layers, every_entry, seed, as_json) else 1


def _layer_tables(layers, every_entry, seed, as_json):
    reports = []
    for name in layers:
        for number, report in enumerate(check_layer(name, seed, every_entry), 1):
            reports.append((name, report))
            if not as_json:
                click.secho(f"{name}, case {number}", bold=True)
                for line, is_bad in report.lines():
                    click.secho(f"  {line}", fg="red" if is_bad else None)
    ok = all(report.ok for _, report in reports)
    rows = [row for _, report in reports for row in report.rows]
    worst = max((row.error for row in rows if row.verdict == "ok"), default=0.0)
    if as_json:
        cases = [
            {"layer": name, "ok": r.ok, "problems": r.problems, "rows": [*map(_plain, r.rows)]}
            for name, r in reports
        ]
        print_json({"ok": ok, "seed": seed, "worst_error": worst, "cases": cases})
    else:
        verdict = "all right" if ok else "WRONG, see above"
        click.secho(
            f"layers: {len(layers)}, cases: {len(reports)}, tensors: {len(rows)}: {verdict}",
            fg=None if ok else "red",
        )
        click.echo(f"largest relative error of a right one: {worst:.0e}")
    return ok


def _plain(row):
    """A row for JSON, which has no infinity."""
    return {
        k: None if isinstance(v, float) and not isfinite(v) else v for k, v in vars(row).items()
    }


def _kill_table(layers, every_entry, seed, as_json):
    catalogue = (*MUTANTS, *NEIGHBOUR_MUTANTS)
    chosen = [m for m in catalogue if m.function.removesuffix("_backward") in layers]
    caught = 0
    results = []
    if not as_json:
        click.echo("| planted in | bug | caught by |\n| --- | --- | --- |")
    for mutant in chosen:
        answer = catch(mutant, seed, every_entry)
        caught += bool(answer)
        results.append({"function": mutant.function, "name": mutant.name, "caught_by": answer})
        if not as_json:
            row = f"| `{mutant.function}` | {mutant.story} | {answer or 'NOBODY'} |"
            click.secho(folded(row, 2), fg=None if answer else "red")
    if as_json:
        print_json({"mutants": len(chosen), "caught": caught, "results": results})
    else:
        click.echo(f"\n{caught} of {len(chosen)} planted bugs caught (seed {seed}).")
    return caught == len(chosen)
