"""A run that begins from somebody's weights: its options lie beneath those of the user."""

from dataclasses import dataclass

import torch

from common.errors import UserError
from common.files import file_sha256
from configurator import CommandLine, Layer
from interop.exporter import HARMLESS, of_training
from interop.source import Source, open_source
from model_builder import Transformer, build_model
from model_config import ROPE_SCALING_REGISTRY, ModelArchitectureConfig
from optim.step import Updater
from parallel.strategies import SingleProcess
from training.resumption import Progress
from training_config import BEGINNINGS, Settings, schema
from training_logger import TrainingLogger


def of_longer_context(config: ModelArchitectureConfig) -> set[str]:
    """Options that a run with imported weights may set to reach beyond their context."""
    if config.to_dict().get('rope_scaling') != 'none':  # no RoPE, or it has been scaled before
        return set()
    scalings = (ROPE_SCALING_REGISTRY[name] for name in ROPE_SCALING_REGISTRY)
    return {'rope_scaling', *(key for scaling in scalings for key in scaling.options)}


@dataclass
class Imported:
    """A new run that begins from somebody's weights. As `resumption.Resumed` to `train.py`."""

    source: Source
    run_folder = None  # a new one

    @property
    def weights_from(self) -> dict:
        """For the record: what the user named, what it is, and the sums of the files."""
        return {
            'source': self.source.name,
            'architecture': self.source.family.architecture,
            'files': {path.name: file_sha256(path) for path in self.source.files},
        }

    def check(self, settings: Settings) -> None:
        """Refuse options that contradict the source. Raises UserError naming them."""
        architecture = settings.architecture
        theirs, now = self.source.config.to_dict(), architecture.to_dict()
        free = {*HARMLESS, *of_training(architecture), *of_longer_context(self.source.config)}
        problems = [
            f'{key}={now.get(key)!r} ({architecture.origins.get(key, "not in use")}) contradicts '
            f'init_from={self.source.name}, which has {theirs.get(key)!r}: leave {key} out.'
            for key in {**theirs, **now}
            if key not in free and theirs.get(key) != now.get(key)
        ]
        known, scaling = self.source.config.block_size, now.get('rope_scaling')
        if scaling not in ('none', theirs.get('rope_scaling')) and architecture.block_size <= known:
            problems.append(
                f'rope_scaling={scaling!r} is for more tokens than the {known} of '
                f'init_from={self.source.name}, and block_size={architecture.block_size}: leave '
                f'it out, or give a larger --block_size.'
            )
        places = build_model(self.source.config).position_encoding.max_length
        if places is not None and architecture.block_size > places:
            problems.append(
                f'block_size={architecture.block_size}: init_from={self.source.name} has places '
                f'for {places} tokens, and learned ones cannot be made up: --block_size={places}, '
                f'or less.'
            )
        if problems:
            raise UserError(*problems)

    @torch.no_grad()
    def restore(self, parallel: SingleProcess, model: Transformer, updater: Updater) -> Progress:
        """Fill what this rank holds of each parameter; nothing has been trained yet."""
        pieces = parallel.weights(model)
        for name, tensor in self.source.weights(model.config):
            piece = pieces[name]
            end = piece.offset + len(piece.tensor)
            piece.tensor.copy_(tensor.reshape(-1)[piece.offset : end])
        return Progress()

    def report(self, logger: TrainingLogger, header: dict, surroundings: dict) -> None:
        """Begin the record."""
        logger.start(**header)
        for note in self.source.notes:
            logger.event('note', None, note)
        options, known = header['config'], self.source.config.block_size
        if options['block_size'] > known and options.get('rope_scaling') == 'none':
            logger.event(
                'note',
                None,
                f'block_size={options["block_size"]}: {self.source.name} was trained on {known} '
                f'tokens, and RoPE as it is goes badly beyond that: --rope_scaling=yarn.',
            )


def find(arguments: CommandLine) -> Imported | None:
    """The checkpoint that the command line begins from; its architecture lies beneath all else.

    Raises UserError if it cannot be read or expressed.
    """
    init_from = arguments.value('init_from', schema)
    if init_from in BEGINNINGS:
        return None
    source = open_source(init_from)
    source.check()
    own = of_training(source.config)
    values = {key: value for key, value in source.config.to_dict().items() if key not in own}
    values['arch_preset'] = source.config.preset
    beneath = Layer(init_from, values)
    arguments.layers.insert(0, beneath)
    if of_longer_context(source.config) and arguments.value('rope_scaling', schema) != 'none':
        known, length = source.config.block_size, arguments.value('block_size', schema)
        beneath.values['rope_scaling_factor'] = max(1.0, length / known)
        beneath.values['rope_original_block_size'] = known
    return Imported(source)
