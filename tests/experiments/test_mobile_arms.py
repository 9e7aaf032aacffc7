"""The experiment `mobile`: what its nine arms are, what its table says, and when it says no."""

import csv
from dataclasses import replace
from statistics import stdev

import pytest
from test_experiment import command, planned, program, small  # noqa: F401 (fixtures)

from miniconvit.errors import UserError
from miniconvit.experiments import mobile
from miniconvit.experiments.figures import draw
from miniconvit.experiments.plan import complete
from miniconvit.experiments.run import Outcome
from miniconvit.experiments.tables import entries_of, write_tables
from miniconvit.neighbours.mobile import MOBILES

STEM = {"patches": 30.0, "conv": 32.0, "grids": 33.0}
READOUT = {"class_token": 0.0, "mean": -1.0, "fusion": 6.0}
NOISE = (-0.5, 0.0, 0.5)


def outcomes_of(plan, whole=0.0):
    """Effects that add up, and `whole` points more for the whole; the seeds differ by NOISE."""
    found = []
    for row, seed in plan.runs:
        stem, readout = row.name.split("-")
        top1 = STEM[stem] + READOUT[readout] + whole * (row.name == mobile.WHOLE) + NOISE[seed]
        found.append(Outcome(row.name, seed, {"top1": top1 / 100}, parameters=81_322))
    return found


def said(plan, outcomes):
    return list(mobile.verdicts(entries_of(plan, outcomes)))


def test_the_nine_arms_are_all_models_and_differ_in_stem_and_read_out_alone():
    plan = planned("mobile", budget=100.0)
    assert {row.settings.model for row in plan.rows} == set(MOBILES)
    for row in plan.rows:
        stem, readout = row.name.split("-")
        config = MOBILES[row.settings.model]
        assert config.readout == readout and (config.stem == "patches") == (stem == "patches")
        assert len(config.grids) == (3 if stem == "grids" else 1)
    assert len({row.label for row in plan.rows}) == 9
    with pytest.raises(UserError, match="nine models of its own: leave out --model"):
        complete("mobile", {"model": "convit_micro32"})


def test_main_effects_that_add_up_are_found():
    plan = planned("mobile", budget=100.0, seeds=3)
    rule, stem, grids, readout, rest, averaged = said(plan, outcomes_of(plan))
    assert rule.endswith(": yes")
    for sentence, points, share in ((stem, 2, 22), (grids, 1, 11), (readout, 6, 67)):
        assert f": +{points}.0 ± 0.0 points, beyond the spread of the seeds, {share} %" in sentence
    assert ": +0.0 ± 0.0 points" in rest and ": -1.0 ±" in averaged


def test_what_only_the_whole_has_is_no_part_s_alone():
    """9 points more in one of nine cells: 3 to each effect that it takes part in, 3 left over."""
    plan = planned("mobile", budget=100.0, seeds=3)
    _, stem, grids, readout, rest, _ = said(plan, outcomes_of(plan, 9.0))
    assert ": +2.0 " in stem and ": +4.0 " in grids and ": +9.0 " in readout and ": +3.0 " in rest


def test_the_rule_can_fail_and_an_effect_can_be_within_the_spread():
    plan = planned("mobile", budget=100.0, seeds=3)
    outcomes = [o for o in outcomes_of(plan) if o.row != mobile.WHOLE]
    values = (0.26, 0.32, 0.44)
    outcomes += [Outcome(mobile.WHOLE, seed, {"top1": value}) for seed, value in enumerate(values)]
    rule, _, grids, *_ = said(plan, outcomes)
    assert 100 * stdev(values) > 4.0 and rule.endswith(": NO")
    assert "within the spread of the seeds" in grids


def test_nothing_is_said_before_all_runs_are_there_or_where_one_diverged():
    plan = planned("mobile", budget=100.0, seeds=3)
    outcomes = outcomes_of(plan)
    assert said(plan, outcomes[:-1]) == []
    lost = Outcome(outcomes[-1].row, 2, None, diverged="the loss is nan")
    assert said(plan, [*outcomes[:-1], lost]) == []
    alone = planned("mobile", budget=100.0, seeds=1)
    assert len(said(alone, outcomes_of(alone))) == 5


def test_table_and_picture_have_costs_beside_accuracies(tmp_path):
    plan = planned("mobile", budget=100.0, seeds=3)
    outcomes = outcomes_of(plan)
    entries, text = write_tables(plan, outcomes, tmp_path)
    assert "| parameters | MACs (millions) | images/s |" in text and text.count("\n| ") == 11
    assert "three grids, fusion against patches" in text and "beyond the spread of 0.7" in text
    lines = list(csv.DictReader((tmp_path / "table.csv").open()))
    plain, *_, whole = lines
    assert (plain["row"], whole["row"]) == (mobile.PLAIN, mobile.WHOLE)
    assert "| 81,322 | 6.56 | 300 |\n" in text
    assert float(plain["million_macs"]) == 6.562656 and float(whole["million_macs"]) == 9.906984
    assert draw(plan, outcomes, entries, tmp_path) == ["mobile.png"]
    assert (tmp_path / "mobile.png").stat().st_size > 10000
    few = write_tables(plan, outcomes[:2], tmp_path)[0]
    assert draw(plan, outcomes[:2], few, tmp_path) == ["mobile.png"]


def test_a_small_plan_is_trained_read_and_drawn(small, monkeypatch, tmp_path, program):  # noqa: F811
    for name, config in MOBILES.items():
        sizes = {"img_size": 8, "strides": config.strides[:2], "embed_dim": 8, "depth": 1}
        monkeypatch.setitem(MOBILES, name, replace(config, **sizes))
    argv = command("mobile", "x", seeds=1, budget=10)
    status, out, err = program(*argv)
    assert status == 0, err
    assert len(list(csv.DictReader((tmp_path / "x/table.csv").open()))) == 9
    assert "What these three do not add up to: " in out and "The rule, that" not in out
    assert (tmp_path / "x/mobile.png").stat().st_size > 10000
    again = program("mobile", "--out", "x")
    assert again[0] == 0 and again[1].endswith(out[out.index("# mobile") :])
