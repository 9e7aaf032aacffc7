"""The paper's ablations beside the architecture: what is not trained (its table 3), and what is
masked at test time (its tables 5 and 6). They change parameters, so no layer knows of them.
"""

from .arrays import array_module
from .errors import UserError
from .model import init_params, param_shapes

FREEZE = ("gates", "attention")
OPEN = 100.0  # sigmoid(100) is 1 and sigmoid(-100) is 0, to the bit


def frozen_names(config, freeze):
    """Names of the parameters that are not trained, a set.

    freeze: "gates", those of all GPSA blocks; "attention", all attention parameters, gates too, of
    all GPSA (or PSA) blocks; None. Raises UserError where there is nothing to freeze.
    """
    if freeze is None:
        return set()
    blocks = range(min(config.local_up_to_layer, config.depth))
    attention = tuple(f"blocks.{i}.attn." for i in blocks)
    names = {name for name in param_shapes(config) if name.startswith(attention)}
    if freeze == "gates":
        names = {name for name in names if name.endswith("gating_param")}
    if not names:
        raise UserError(
            f"this model has no {freeze} of GPSA to freeze: leave out --freeze, "
            "or choose a model with GPSA blocks"
        )
    return names


def initial_params(config, seed, freeze=None):
    """init_params, with the gates that are frozen at 0: content and position have equal shares."""
    params = init_params(config, seed)
    for name in frozen_names(config, freeze):
        if name.endswith("gating_param"):
            params[name][...] = 0.0
    return params


def without_pos_embed(params):
    """params with an absolute positional embedding of zero. Raises UserError without one."""
    if "pos_embed" not in params:
        raise UserError("this model has no positional embedding to mask")
    return params | {"pos_embed": array_module(params["pos_embed"]).zeros_like(params["pos_embed"])}


def without_branch(params, branch, blocks):
    """params whose first `blocks` GPSA blocks do without one branch: the gates are moved aside.

    branch: "content" (sigmoid(gating_param) is 1) or "position" (it is 0). Raises UserError where
    there are not so many GPSA blocks.
    """
    value = {"content": OPEN, "position": -OPEN}[branch]
    names = [f"blocks.{i}.attn.gating_param" for i in range(blocks)]
    if blocks < 1 or not params.keys() >= set(names):
        have = sum(name.endswith("gating_param") for name in params)
        raise UserError(
            f"the {branch} branch can be masked in the first 1 to {have} blocks, not {blocks}"
            if have
            else f"this model has no GPSA block whose {branch} branch could be masked"
        )
    xp = array_module(params[names[0]])
    return params | {name: xp.full_like(params[name], value) for name in names}
