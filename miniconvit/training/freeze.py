"""What of a model is not trained: the ablations of the paper's table 3."""

from ..arrays import Params
from ..config import ConViTConfig
from ..errors import UserError
from ..model import param_shapes
from ..neighbours.models import MODELS

FREEZE = ("gates", "attention")


def frozen_names(config: ConViTConfig, freeze: str | None) -> set[str]:
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


def initial_params(config: ConViTConfig, seed: int, freeze: str | None = None) -> Params:
    """Fresh ones, with the gates that are frozen at 0: content and position have equal shares."""
    params = MODELS[type(config)].init(config, seed)
    for name in frozen_names(config, freeze):
        if name.endswith("gating_param"):
            params[name][...] = 0.0
    return params
