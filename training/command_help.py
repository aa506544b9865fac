"""The help pages of train.py: the options that most runs set, and all options by group."""

from collections.abc import Iterator

from common.option_help import CommandHelp, HelpGroup, split_by_choice
from configurator import Schema
from model_config import schema as architecture_schema
from training_config import PLAN_GROUP, run_schema

ESSENTIAL_OPTIONS = (
    *(
        'dataset',
        'out_dir',
        'init_from',
        'max_iters',
        'batch_size',
        'learning_rate',
        'arch_preset',
        'like',
        'n_layer',
    ),
    *('normalization', 'position_encoding', 'ffn_type'),
)
# In the order of training_config's groups: the name of each in --help=NAME, and its subject.
RUN_GROUPS = (
    ('run', 'Output, start or resume, evaluation, checkpoints'),
    ('data', 'Dataset, batch size, seeds, sampling order'),
    ('optimizer', 'Iterations, optimizer, learning rate, clipping'),
    ('system', 'Device, dtype, torch.compile, recomputation'),
    ('distributed', 'ZeRO-1, FSDP, timeouts (with torchrun)'),
    ('trackers', 'TensorBoard, Weights & Biases'),
    ('plan', 'Memory and time of a run, without running it'),
)
# Groups within the architecture: its name, subject, and the options whose components belong to it.
ARCHITECTURE_GROUPS = (
    (
        'attention',
        'Heads, grouped queries, windows, masks, MLA, backend',
        ('attention_type', 'attention_backend', 'attention_dropout'),
    ),
    ('position', 'Position encoding, RoPE scaling', ('position_encoding',)),
    ('mixer', 'Recurrences, state spaces, convolutions instead of attention', ('mixer',)),
    (
        'norm',
        'Normalization, position of the norms in a block, residual stream',
        ('normalization', 'norm_position', 'residual'),
    ),
    ('ffn', 'Feed-forward network, activation, mixture of experts', ('ffn_type', 'd_ff')),
)
MORE_PAGES = {
    '--list_components': 'Descriptions and sources of all components',
    '--print_config': 'Every value and its origin, without a run',
}


def help_groups() -> Iterator[HelpGroup]:
    """All options of a run, also those that a config file registered, each in one group."""
    schema: Schema = {**run_schema(), **PLAN_GROUP}
    for (name, about), options in zip(RUN_GROUPS, schema.values(), strict=True):
        yield HelpGroup(name, about, options)
    (rest,) = architecture_schema().values()
    groups = []
    for name, about, roots in ARCHITECTURE_GROUPS:
        options, rest = split_by_choice(rest, roots)
        groups.append(HelpGroup(name, about, options))
    yield HelpGroup('architecture', 'Preset, sizes, kinds of layers, initialization', rest)
    yield from groups


def training_help(usage: str) -> CommandHelp:
    return CommandHelp(usage, list(help_groups()), ESSENTIAL_OPTIONS, more=MORE_PAGES)
