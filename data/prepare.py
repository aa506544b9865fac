"""Make a dataset from your own text.

    python data/prepare.py my_texts/ --out=data/mine
    python data/prepare.py 'logs/**/*.jsonl.gz' --field=message --tokenizer=bpe --out=data/logs
    python data/prepare.py --hf=roneneldan/TinyStories --out=data/stories
    python train.py --dataset=mine

PATHS are files, folders and glob patterns (in quotes). Text files (.txt, .md and others) are one
document each. Files of rows (.jsonl, .ndjson, .json, .parquet) are one document per row, with the
text in --field; a .json file may contain lines, an array of objects, or one object. All but
.parquet may be compressed (.gz, .bz2, .xz, .zst). Packages: pyarrow for .parquet, backports.zstd
for .zst up to Python 3.13.

A folder means all such files in it and its subfolders, except plain .json files, for which you give
a pattern such as 'my_texts/**/*.json'. Skipped files are reported. --hf reads a dataset of the
Hugging Face Hub instead (package datasets).

Each document ends with the end-of-text token. Its hash decides whether it is for training or
validation. Run the same command again to continue an interrupted preparation, also after you have
fixed or removed a bad file: the documents before it are kept.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common.first_import  # noqa: F401

from common.errors import ArgumentParser, UserError, did_you_mean, run_script
from common.paths import expand_home
from data.preparation.pipeline import SHARD_TOKENS, VAL_FRACTION, PreparationOptions, prepare
from data.preparation.sources import DocumentSource, FileSource, HuggingFaceSource
from data.preparation.train_tokenizer import SMALLEST_BPE
from data.tokenizer import tiktoken_names

TOKENIZER_DESCRIPTIONS: dict[str, dict] = {
    'gpt2': {'kind': 'gpt2'},
    'byte': {'kind': 'byte', 'end_of_text': True},
    'char': {'kind': 'char', 'end_of_text': True},
    'bpe': {'kind': 'bpe'},
}
MINIMUM = {
    'vocab_size': SMALLEST_BPE,
    'cut': 64,
    'max_documents': 1,
    'shard_tokens': 1,
    'workers': 1,
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        prog='data/prepare.py',
        description=__doc__,
    )
    add = parser.add_argument
    add(
        'paths',
        nargs='*',
        type=expand_home,
        metavar='PATHS',
        help='Files, folders and glob patterns',
    )
    add(
        '--out', type=expand_home, metavar='FOLDER', help='Folder of the dataset, such as data/mine'
    )
    add(
        '--tokenizer',
        default='gpt2',
        metavar='NAME',
        help='Tokenizer: gpt2, byte, char, bpe (byte pairs trained on the corpus; needs the '
        'package tokenizers), or an encoding of tiktoken, such as cl100k_base (default gpt2)',
    )
    add('--vocab_size', type=int, metavar='N', help='Vocabulary size of bpe (default 8192)')
    add(
        '--field',
        default='text',
        metavar='NAME',
        help='Field of a row with its text (default text)',
    )
    add(
        '--cut',
        type=int,
        default=2**24,
        metavar='BYTES',
        help='Size above which a text is cut into documents of about this size, at blank lines if '
        'possible (default 16777216)',
    )
    add(
        '--val_fraction',
        type=float,
        default=VAL_FRACTION,
        metavar='F',
        help=f'Share of the documents for validation (default {VAL_FRACTION})',
    )
    add('--max_documents', type=int, metavar='N', help='Number of documents to read (default: all)')
    _add_more_options(parser)
    options = parser.parse(argv)
    if problems := list(_problems(options)):
        raise UserError(*problems)
    return options


def _add_more_options(parser: ArgumentParser) -> None:
    """Options for the Hugging Face Hub, and for the preparation itself."""
    add = parser.add_argument
    add('--hf', metavar='NAME', help='Dataset of the Hugging Face Hub, streamed')
    add('--hf_subset', metavar='NAME', help='Subset of the Hugging Face dataset')
    add(
        '--hf_split',
        default='train',
        metavar='NAME',
        help='Split of the Hugging Face dataset (default train)',
    )
    add(
        '--shard_tokens',
        type=int,
        default=SHARD_TOKENS,
        metavar='N',
        help=f'Tokens per file; a longer split has several files (default {SHARD_TOKENS:,})',
    )
    add('--workers', type=int, metavar='N', help='Number of processes (default: one per core)')
    add('--skip_invalid', action='store_true', help='Skip and count invalid documents')
    add('--restart', action='store_true', help='Start over, also if the dataset is finished')


def _problems(options: argparse.Namespace):
    if not options.out:
        yield 'No folder is given for the dataset. Add one, for example --out=data/mine'
    if bool(options.paths) == bool(options.hf):
        yield 'Give either PATHS of files and folders, or --hf=NAME.'
    for key, least in MINIMUM.items():
        value = getattr(options, key)
        if value is not None and value < least:
            yield f'--{key}={value}: takes a whole number of at least {least}.'
    if not 0 < options.val_fraction < 1:
        yield f'--val_fraction={options.val_fraction}: takes a number between 0 and 1.'
    if options.vocab_size and options.tokenizer != 'bpe':
        yield (
            f'--vocab_size needs --tokenizer=bpe; the vocabulary of {options.tokenizer} is fixed. '
            f'Remove it.'
        )
    if options.tokenizer not in TOKENIZER_DESCRIPTIONS:
        known = [
            *TOKENIZER_DESCRIPTIONS,
            *(n for n in tiktoken_names() if n not in TOKENIZER_DESCRIPTIONS),
        ]
        if options.tokenizer not in known:
            hint = did_you_mean(options.tokenizer, known)
            yield (
                f'--tokenizer={options.tokenizer} is unknown.{hint} Tokenizers: {", ".join(known)}'
            )


def tokenizer_of(options: argparse.Namespace) -> dict:
    """The description of the chosen tokenizer, as in meta.json."""
    if options.tokenizer not in TOKENIZER_DESCRIPTIONS:
        return {'kind': 'tiktoken', 'name': options.tokenizer}
    size = {'vocab_size': options.vocab_size or 8192} if options.tokenizer == 'bpe' else {}
    return {**TOKENIZER_DESCRIPTIONS[options.tokenizer], **size}


def source_of(options: argparse.Namespace) -> DocumentSource:
    """The source that the options describe. Raises UserError."""
    field, limit = options.field, options.max_documents
    if options.hf:
        return HuggingFaceSource(options.hf, options.hf_subset, options.hf_split, field, limit)
    return FileSource(options.paths, field, options.cut, limit)


def main(argv: list[str] | None = None) -> None:
    options = parse_arguments(argv)
    prepare(
        Path(options.out),
        source_of(options),
        PreparationOptions(
            tokenizer=tokenizer_of(options),
            val_fraction=options.val_fraction,
            shard_tokens=options.shard_tokens,
            workers=options.workers,
            skip_invalid=options.skip_invalid,
            restart=options.restart,
        ),
    )


if __name__ == '__main__':
    run_script(main)
