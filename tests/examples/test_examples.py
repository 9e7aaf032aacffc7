"""The smaller examples run, print what they promise, and are as short as their names say."""

import numpy as np
import pytest
from example_file import EXAMPLES, load_example


def test_sixty_lines_train(capsys):
    assert len((EXAMPLES / "train_in_60_lines.py").read_text().splitlines()) <= 60
    accuracy = load_example("train_in_60_lines").main(steps=2)
    assert 0 < accuracy < 1
    assert capsys.readouterr().out == f"epoch 1: {accuracy:.1%} of the validation images right\n"


@pytest.mark.full
def test_sixty_lines_reach_95_per_cent():
    assert load_example("train_in_60_lines").main() >= 0.95


def test_the_checker_says_where_the_broken_layer_is_wrong(capsys):
    right, broken = load_example("your_own_layer").main()
    assert right.ok and not broken.ok
    verdicts = [{row.name: row.verdict for row in report.rows} for report in (right, broken)]
    assert verdicts == [{"x": "ok", "weight": "ok"}, {"x": "WRONG", "weight": "ok"}]
    assert str(broken) in capsys.readouterr().out


def test_the_broken_layer_points_downhill_as_it_says():
    layer = load_example("your_own_layer")
    rng = np.random.default_rng(1)
    x, weight, dy = rng.standard_normal((3, 8)), rng.standard_normal(8), rng.standard_normal((3, 8))
    _, cache = layer.rmsnorm_forward(x, weight)
    right = layer.rmsnorm_backward(dy, cache)["x"]
    wrong = layer.broken_backward(dy, cache)["x"]
    assert ((right * wrong).sum(axis=-1) > 0).all()
