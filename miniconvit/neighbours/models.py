"""Which models there are: what a configuration is of, and by which name a checkpoint tells it."""

from collections import ChainMap
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

from ..arrays import Array, Params
from ..config import VARIANTS, ConViTConfig
from ..errors import UserError, unknown_name
from ..model import init_params, param_shapes
from ..optim import is_running
from .cmt import CMT_VARIANTS, CMTConfig, cmt_backward, cmt_forward, cmt_shapes, init_cmt
from .diversity import PatchHeadConfig, init_with_patch_head, patch_head_shapes
from .gan import GANConfig, gan_shapes, init_gan
from .isotropic import IsotropicConfig, init_isotropic, isotropic_shapes
from .mobile import (
    MOBILES,
    MobileConfig,
    init_mobile,
    mobile_backward,
    mobile_forward,
    mobile_shapes,
)


@dataclass(frozen=True)
class Model:
    """kind: its name in files; shapes(config): name to shape; init(config, seed): parameters.

    Of a classifier beside ConViT also forward(images, params, config, train, blocks) -> logits,
    cache and backward(dlogits, cache) -> gradients by name; and what an Objective is told of its
    config: image, in_chans, num_classes, and rows. blocks: as in convit_forward. variants:
    configurations by name, to choose by --model.
    """

    kind: str
    shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    init: Callable[[Any, int], Params]
    forward: Callable[[Array, Params, Any, bool, Any], tuple[Array, Any]] | None = None
    backward: Callable[[Array, Any], Params] | None = None
    variants: dict[str, Any] = field(default_factory=dict)


MODELS = {
    ConViTConfig: Model("convit", param_shapes, init_params, variants=VARIANTS),
    PatchHeadConfig: Model("convit_patch_head", patch_head_shapes, init_with_patch_head),
    IsotropicConfig: Model("isotropic", isotropic_shapes, init_isotropic),
    GANConfig: Model("vitgan", gan_shapes, init_gan),
    CMTConfig: Model("cmt", cmt_shapes, init_cmt, cmt_forward, cmt_backward, CMT_VARIANTS),
    MobileConfig: Model(
        "mobile", mobile_shapes, init_mobile, mobile_forward, mobile_backward, MOBILES
    ),
}
"""The class of a configuration to the functions of its model."""

ALL_VARIANTS = ChainMap(*[model.variants for model in reversed(MODELS.values())])
"""Name to configuration of every model that --model can name, ConViTs first."""


def is_convit(config):
    """Whether it is of ConViT's own network, a plain ViT too."""
    return isinstance(config, ConViTConfig)


def shapes_of(config):
    """Name to shape of the parameters of any configuration's model."""
    return MODELS[type(config)].shapes(config)


def count_parameters(config):
    """How many numbers of a model are trained: running statistics are not."""
    return sum(prod(shape) for name, shape in shapes_of(config).items() if not is_running(name))


def config_to_dict(config):
    """For JSON: its fields, and the kind where it is not simply a ConViT."""
    kind = MODELS[type(config)].kind
    return ({} if kind == "convit" else {"kind": kind}) | asdict(config)


def config_from_dict(values):
    """The inverse. Raises UserError for a kind or a field that is unknown."""
    values = dict(values)
    kind = values.pop("kind", "convit")
    classes = {model.kind: cls for cls, model in MODELS.items()}
    if kind not in classes:
        raise UserError(unknown_name("kind of model", str(kind)[:40], classes))
    return classes[kind].from_dict(values)
