"""The options of the released models whose designs `--like` gives (`common.published_designs`)."""

from common.errors import UserError
from common.option_merge import Layer
from common.published_designs import PUBLISHED_DESIGNS
from configurator import validate_layer
from interop.families import TRANSFORMERS
from model_config import schema


def published_options(family: str) -> dict:
    """Our options of the family's released model, at its published size."""
    design = PUBLISHED_DESIGNS[family]
    problems: list[str] = []
    options = TRANSFORMERS[family].read(design.config, problems)
    layer = validate_layer(Layer(design.model, options), schema(), problems)
    if problems:
        raise UserError(*(f'like={family!r}, {design.model}: {problem}' for problem in problems))
    return layer.values
