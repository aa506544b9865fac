"""Make a dataset of your own text.

    python data/prepare.py my_texts/ --out=data/mine
    python train.py --dataset=mine

PATHS are files, folders and glob patterns (in quotes): .txt, .md and any other text, a document a
file; .jsonl, .ndjson, .json and .parquet, a document a row, in the field that --field names. A
.json file may hold lines, an array of objects, or one object. All but .parquet may be compressed:
.gz, .bz2, .xz or .zst. Packages: pyarrow for .parquet; backports.zstd for .zst, up to Python 3.13.
A folder stands for all such files in and below it, those behind links too, each real folder once,
but for plain .json, which a pattern names: 'my_texts/**/*.json'. What is left out is named. Or --hf
names a dataset on Hugging Face's hub (package datasets).

A document ends with the end-of-text token, and is for training or for validation as a whole: its
own hash decides. What is interrupted goes on where it was when the same command is given again,
also after a bad file was mended or removed: what comes before the change is kept.
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
        prog='prepare.py',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        'paths',
        nargs='*',
        type=expand_home,
        metavar='PATHS',
        help='files, folders and glob patterns',
    )
    add('--out', type=expand_home, metavar='FOLDER', help='the dataset, such as data/mine')
    add(
        '--tokenizer',
        default='gpt2',
        help='gpt2, byte, char, bpe (byte pairs trained on the corpus; pip install tokenizers), or '
        "the name of one of tiktoken's encodings, such as cl100k_base (default gpt2)",
    )
    add('--vocab_size', type=int, metavar='N', help='of bpe (default 8192)')
    add('--field', default='text', help='that holds the text of a row (default text)')
    add(
        '--cut',
        type=int,
        default=2**24,
        metavar='BYTES',
        help='texts longer than this become documents of about this size, cut at blank lines where '
        'possible (default 16777216)',
    )
    add(
        '--val_fraction',
        type=float,
        default=VAL_FRACTION,
        metavar='F',
        help=f'share of the documents that is for validation (default {VAL_FRACTION})',
    )
    add('--max_documents', type=int, metavar='N', help='only the first N (default: all)')
    add('--hf', metavar='NAME', help="a dataset on Hugging Face's hub, read as it arrives")
    add('--hf_subset', metavar='NAME', help='of that dataset')
    add('--hf_split', default='train', metavar='NAME', help='of that dataset (default train)')
    add(
        '--shard_tokens',
        type=int,
        default=SHARD_TOKENS,
        metavar='N',
        help=f'tokens in a file; a split with more has several (default {SHARD_TOKENS:,})',
    )
    add('--workers', type=int, metavar='N', help='processes (default: one a core)')
    add('--skip_invalid', action='store_true', help='leave out documents that cannot be used')
    add('--restart', action='store_true', help='do anew what is unfinished or done')
    options = parser.parse(argv)
    if problems := list(_problems(options)):
        raise UserError(*problems)
    return options


def _problems(options: argparse.Namespace):
    if not options.out:
        yield 'Where to? Give the folder of the dataset: --out=data/mine'
    if bool(options.paths) == bool(options.hf):
        yield 'Give either PATHS of files and folders, or --hf=NAME.'
    for key, least in MINIMUM.items():
        value = getattr(options, key)
        if value is not None and value < least:
            yield f'--{key}={value}: takes a whole number of at least {least}.'
    if not 0 < options.val_fraction < 1:
        yield f'--val_fraction={options.val_fraction}: takes a number between 0 and 1.'
    if options.vocab_size and options.tokenizer != 'bpe':
        yield f'--vocab_size is for --tokenizer=bpe only; {options.tokenizer} has its own.'
    if options.tokenizer not in TOKENIZER_DESCRIPTIONS:
        known = [
            *TOKENIZER_DESCRIPTIONS,
            *(n for n in tiktoken_names() if n not in TOKENIZER_DESCRIPTIONS),
        ]
        if options.tokenizer not in known:
            hint = did_you_mean(options.tokenizer, known)
            yield (
                f'--tokenizer={options.tokenizer} is unknown.{hint} There are: {", ".join(known)}'
            )


def tokenizer_of(options: argparse.Namespace) -> dict:
    """What the options ask for, as meta.json describes it."""
    if options.tokenizer not in TOKENIZER_DESCRIPTIONS:
        return {'kind': 'tiktoken', 'name': options.tokenizer}
    size = {'vocab_size': options.vocab_size or 8192} if options.tokenizer == 'bpe' else {}
    return {**TOKENIZER_DESCRIPTIONS[options.tokenizer], **size}


def source_of(options: argparse.Namespace) -> DocumentSource:
    """The documents that the options name. Raises UserError."""
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
