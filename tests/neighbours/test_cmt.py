"""CMT: autograd's and the authors' numbers, and runs that train, stop, go on and answer by it."""

import json
from dataclasses import asdict, replace
from math import prod

import numpy as np
import pytest
from golden_cases import GOLDEN, assert_equal, load_case, read_parts
from small_run import small_dataset, stop_after

from miniconvit import layers
from miniconvit.arrays import to_cpu, to_device
from miniconvit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from miniconvit.cli import eval as evaluation
from miniconvit.engine import classification, make_engine
from miniconvit.engine.pieces import cut
from miniconvit.errors import UserError
from miniconvit.experiments import biases
from miniconvit.gradcheck.neighbours import DEAD
from miniconvit.neighbours import cmt_backward, cmt_forward
from miniconvit.neighbours.cmt import CMT_VARIANTS, CMTConfig, cmt_shapes, init_cmt, recognise_cmt
from miniconvit.neighbours.models import (
    ALL_VARIANTS,
    config_from_dict,
    config_to_dict,
    count_parameters,
)
from miniconvit.optim import AdamW, is_running
from miniconvit.training import run as run_module
from miniconvit.training.loop import train
from miniconvit.training.settings import make_settings

SMALL = CMTConfig(8, 3, 3, 4, (6, 8), (1, 2), (1, 2), (2, 1), 1.5, 10)


def cmt_case(name):
    parts = read_parts(GOLDEN, name, "in", "grad", "after")
    return CMTConfig.from_dict(json.loads(parts["config"].item())), parts.pop("in"), parts


@pytest.mark.parametrize("name", ["cmt", "cmt_plain"])
def test_whole_networks_equal_autograd(name):
    config, params, case = cmt_case(name)
    logits, cache = cmt_forward(case["images"], params, config, True)
    assert_equal(logits, case["y"])
    grads = cmt_backward(case["dy"], cache)
    trained = [name for name in grads if not is_running(name)]
    assert list(grads) == list(cmt_shapes(config)) and trained == sorted(
        case["grad"], key=trained.index
    )
    dead = (*sum(DEAD.values(), ())[:5], "blocks_d.0.mlp.conv2.1.bias")
    for key in trained:
        if key.endswith(dead):  # 0, where autograd has round-off
            assert max(np.abs(grads[key]).max(), np.abs(case["grad"][key]).max()) < 1e-10
        else:
            assert_equal(grads[key], case["grad"][key])
    evaluated, _ = cmt_forward(case["images"], params, config, False)
    assert_equal(evaluated, case["evaluated"])
    AdamW(params, 1e-3).step(params, grads)
    for key, expected in case["after"].items():
        assert_equal(params[key], expected)
