"""Start a run from pretrained weights, whose options the user's options may not contradict."""

from dataclasses import dataclass

import torch

from common.architecture_options import short_forms
from common.dict_option import DictOption
from common.errors import UserError
from common.files import file_sha256
from configurator import CommandLine, Layer
from interop.exporter import RUN_TIME_OPTIONS, training_only_options
from interop.layers import in_layers, layer_values, paired_kinds
from interop.pretrained_checkpoint import PretrainedCheckpoint, open_checkpoint
from model_builder import Transformer, build_model
from model_config import ROPE_SCALING_REGISTRY, ModelArchitectureConfig
from optim.step import GuardedOptimizer
from parallel.strategies import SingleProcess, buffer_shards
from records.record_types import RecordHeader, WeightsSource
from training.resume import TrainingProgress
from training_config import INIT_FROM, Settings, schema
from training_logger import TrainingLogger


def _rope_scalings(config: ModelArchitectureConfig) -> set[str]:
    """The scalings of RoPE of all layers that use it."""
    return {kind.rope_scaling for kind in config.kinds.values() if 'rope_scaling' in kind}


def context_extension_options(config: ModelArchitectureConfig) -> set[str]:
    """Options that a run with pretrained weights may set to extend their context."""
    if _rope_scalings(config) != {'none'}:  # no RoPE, or already scaled
        return set()
    scalings = (ROPE_SCALING_REGISTRY[name] for name in ROPE_SCALING_REGISTRY)
    return {'rope_scaling', *(key for scaling in scalings for key in scaling.options)}


def _extend_context(arguments: CommandLine, trained: int, values: dict) -> None:
    """Derive what RoPE scaling needs from the two context lengths, in lowest values.

    The model or kinds of its layers may set a scaling. trained: the context length before.
    """
    factor = max(1.0, arguments.value('block_size', schema) / trained)
    lengths = {'rope_scaling_factor': factor, 'rope_original_block_size': trained}
    if arguments.value('rope_scaling', schema) != 'none':
        values |= lengths
    kinds: dict = {}
    for layer in arguments.layers:
        kinds = DictOption.combined(kinds, layer.values.get('layer_kinds') or {})
    scaled = {
        letter: lengths
        for letter, kind in kinds.items()
        if kind and kind.get('rope_scaling') not in (None, 'none')
    }
    if scaled:
        values['layer_kinds'] = DictOption.combined(scaled, values.get('layer_kinds', {}))


@dataclass
class PretrainedSource:
    """A new run that starts from pretrained weights (a `training.setup.InitSource`)."""

    checkpoint: PretrainedCheckpoint
    run_folder = None  # a new run

    @property
    def weights_from(self) -> WeightsSource:
        """The source for the record: the user's name for it, its architecture, file hashes."""
        return {
            'source': self.checkpoint.name,
            'architecture': self.checkpoint.family.architecture,
            'files': {path.name: file_sha256(path) for path in self.checkpoint.files},
        }

    def check(self, settings: Settings) -> None:
        """Raise UserError naming the options that contradict the source."""
        architecture = settings.architecture
        problems = self._contradictions(architecture)
        known = self.checkpoint.config.block_size
        scalings = _rope_scalings(architecture) - {'none', *_rope_scalings(self.checkpoint.config)}
        if scalings and architecture.block_size <= known:
            problems.append(
                f'rope_scaling={min(scalings)!r} extends the context beyond the {known} tokens of '
                f'init_from={self.checkpoint.name}, but block_size={architecture.block_size}. '
                f'Remove rope_scaling, or raise --block_size.'
            )
        max_length = build_model(self.checkpoint.config).max_length
        if max_length is not None and architecture.block_size > max_length:
            problems.append(
                f'block_size={architecture.block_size}: init_from={self.checkpoint.name} has '
                f'learned positions for {max_length} tokens, which cannot be extended. Use '
                f'--block_size={max_length} or less.'
            )
        if problems:
            raise UserError(*problems)

    def _contradictions(self, architecture: ModelArchitectureConfig) -> list[str]:
        """The options that differ from the checkpoint's in some layer, a sentence each."""
        source = self.checkpoint.config
        allowed = {
            *RUN_TIME_OPTIONS,
            *training_only_options(architecture),
            *context_extension_options(source),
        }
        # 1. Collect the options that differ, with the layers where they do.
        places: dict[tuple[str, str], list[str]] = {}  # of each option and contradiction
        set_by_user = set()
        for place, now, theirs in paired_kinds(architecture, source, layer_values):
            kind = architecture.kinds.get(place, architecture)
            for key in {**theirs, **now}:
                if key not in allowed and theirs.get(key) != now.get(key):
                    text = self._contradiction(key, kind, theirs.get(key))
                    places.setdefault((key, text), []).append(place)
                    if self._sets(key, kind):
                        set_by_user.add(key)
        # 2. Where another pattern was set, the layers differ for no other reason.
        patterns = [
            key
            for key in ('layer_pattern', *short_forms())
            if architecture.get(key) != source.get(key) and self._sets(key, architecture)
        ]
        if places and patterns:
            return [self._contradiction(key, architecture, source.get(key)) for key in patterns]
        # 3. Leave out what only follows from the options that were set.
        wheres = {
            text: in_layers(where, architecture)
            for (key, text), where in places.items()
            if not set_by_user or key in set_by_user
        }
        return [f'{where}: {text}' if where else text for text, where in wheres.items()]

    def _sets(self, key: str, config: ModelArchitectureConfig) -> bool:
        """Whether the user's options set an option of layers that are all alike."""
        origin = config.origins.get(key, 'default')
        return origin not in ('default', self.checkpoint.name) and not origin.startswith('derived')

    def _contradiction(self, key: str, config: ModelArchitectureConfig, theirs: object) -> str:
        return (
            f'{key}={config.get(key)!r} ({config.origins.get(key, "not in use")}) contradicts '
            f'init_from={self.checkpoint.name}, which has {theirs!r}. Remove {key}.'
        )

    @torch.no_grad()
    def restore(
        self, parallel: SingleProcess, model: Transformer, optimizer: GuardedOptimizer
    ) -> TrainingProgress:
        """Load this rank's shard of each parameter. Returns the progress of a new run."""
        shards = parallel.weight_shards(model) | buffer_shards(model)
        for name, tensor in self.checkpoint.weights(model.config):
            shard = shards[name]
            end = shard.offset + len(shard.tensor)
            shard.tensor.copy_(tensor.reshape(-1)[shard.offset : end])
        return TrainingProgress()

    def report(self, logger: TrainingLogger, header: RecordHeader, environment: dict) -> None:
        """Start the record."""
        logger.start(**header)
        for note in self.checkpoint.notes:
            logger.event('note', None, note)
        options, known = header['config'], self.checkpoint.config.block_size
        kinds = [options, *options.get('layer_kinds', {}).values()]
        scalings = {kind['rope_scaling'] for kind in kinds if 'rope_scaling' in kind}
        if options['block_size'] > known and scalings == {'none'}:
            logger.event(
                'note',
                None,
                f'block_size={options["block_size"]}: {self.checkpoint.name} was trained on '
                f'{known} tokens, and unscaled RoPE extrapolates badly. Try --rope_scaling=yarn.',
            )


def find_pretrained(arguments: CommandLine) -> PretrainedSource | None:
    """The pretrained model of init_from, if any. Its options become the lowest layer.

    Raises UserError if it cannot be read or expressed.
    """
    init_from = arguments.value('init_from', schema)
    if init_from in INIT_FROM:
        return None
    checkpoint = open_checkpoint(init_from)
    checkpoint.check()
    config = checkpoint.config
    excluded = {*training_only_options(config), 'attention_backend'}
    values = {key: value for key, value in config.to_dict().items() if key not in excluded}
    values['arch_preset'] = config.preset
    lowest = Layer(init_from, values)
    arguments.layers.insert(0, lowest)
    if context_extension_options(config):
        _extend_context(arguments, config.block_size, lowest.values)
    return PretrainedSource(checkpoint)
