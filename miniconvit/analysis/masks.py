"""What is masked at test time: the paper's tables 5 and 6. No layer knows of it."""

from ..arrays import array_module
from ..errors import UserError

OPEN = 100.0  # sigmoid(100) is 1 and sigmoid(-100) is 0, to the bit


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
