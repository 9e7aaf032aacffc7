"""Which models there are: what a configuration is of, and by which name a checkpoint tells it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ..arrays import Params
from ..config import ConViTConfig
from ..errors import UserError, unknown_name
from ..model import init_params, param_shapes
from .diversity import PatchHeadConfig, init_with_patch_head, patch_head_shapes
from .gan import GANConfig, gan_shapes, init_gan
from .isotropic import IsotropicConfig, init_isotropic, isotropic_shapes


@dataclass(frozen=True)
class Model:
    """kind: its name in files; shapes(config): name to shape; init(config, seed): parameters."""

    kind: str
    shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    init: Callable[[Any, int], Params]


MODELS = {
    ConViTConfig: Model("convit", param_shapes, init_params),
    PatchHeadConfig: Model("convit_patch_head", patch_head_shapes, init_with_patch_head),
    IsotropicConfig: Model("isotropic", isotropic_shapes, init_isotropic),
    GANConfig: Model("vitgan", gan_shapes, init_gan),
}
"""The class of a configuration to the functions of its model."""


def shapes_of(config):
    """Name to shape of the parameters of any configuration's model."""
    return MODELS[type(config)].shapes(config)


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
