"""Designs of released models by family, for `--like=FAMILY`: data in `published_designs.json`.

The file has one entry for each family, whose name is transformers' model_type:

    "qwen2": {"model": "Qwen2 7B", "source": "…", "config": {…}}

config: the fields of the model's config.json that matter. `interop.designs` reads them by the
family's tables, and `common.design_scaling` turns them into options that follow the user's sizes.
"""

import functools
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.design_scaling import scaled_design
from common.option_merge import Layer
from common.registry import Option

FAMILY = 'family '  # the beginning of the origin of a family's options
READER = 'interop.designs'  # imported on first use


class PublishedDesign(NamedTuple):
    """A released model and the fields of its config.json; the source of them."""

    model: str
    source: str
    config: dict


def _read() -> dict[str, PublishedDesign]:
    text = Path(__file__).with_suffix('.json').read_text(encoding='utf-8')
    return {family: PublishedDesign(**entry) for family, entry in json.loads(text).items()}


PUBLISHED_DESIGNS = _read()


@dataclass(frozen=True)
class FamilyOption(Option):
    """A family of models by name. The names are too many for a message or a table."""

    def allowed(self) -> str:
        return 'a family with a published design (--help=like lists them)'


LIKE_OPTION = FamilyOption(
    str | None,
    None,
    'Family whose published design to use; it is scaled to n_layer, n_embd and block_size, and '
    'replaces the preset. Single options override it',
    choices=tuple(PUBLISHED_DESIGNS),
    about={name: f'as {design.model}' for name, design in PUBLISHED_DESIGNS.items()},
)


@functools.cache
def design_layer(family: str) -> Layer:
    """The family's options, as functions of the user's sizes where they depend on them."""
    options = importlib.import_module(READER).published_options(family)
    model = PUBLISHED_DESIGNS[family].model
    return Layer(f'{FAMILY}{family}, as {model}', scaled_design(options))
