"""Options of a run that choose its data, and the sizes and order of its batches."""

from common.registry import Option, at_least
from data.order import ORDERS

# fmt: off
DATA_OPTIONS = {
    'dataset': Option(str, 'shakespeare', 'Dataset: the name of a folder in data/, or a path',
                      is_path=True),
    'verify_data': Option(bool, False, 'Hash all token files at the start; else only files whose '
                          'size or time has changed since the last check'),
    'batch_size': Option(int | None, None, 'Sequences per micro-batch; None: depends on the '
                         'device, on CUDA on its memory', check=at_least(1)),
    'gradient_accumulation_steps': Option(int | None, None,
                                          'Micro-batches per iteration, over all devices; '
                                          'None: depends on the device', check=at_least(1)),
    'seed': Option(int, 1337, 'Seed of weight initialization and dropout', check=at_least(0)),
    'data_seed': Option(int, 1337, 'Seed of the data order', check=at_least(0)),
    'sampling': Option(str, 'random', 'Choice of training windows. random: with replacement, as in '
                       'nanoGPT; epoch: each window once per epoch, in shuffled order',
                       choices=tuple(ORDERS)),
}
# fmt: on
