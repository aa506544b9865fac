"""Measure a checkpoint on text of your own: bits per byte, and multiple choice by likelihood.

    python evaluate.py --out_dir=out-llama --text=book.txt --text=code.py
    python evaluate.py --out_dir=out-llama --choices=items.jsonl --json=results.json
    python evaluate.py --out_dir=out-llama --make_choices=items.jsonl

--text: each token but the first is scored once, by windows of block_size tokens that overlap, so
that it has more than block_size - stride tokens before it wherever the text has. --choices: each
line an item, {"context": "The capital of France is", "choices": [" Paris", " Rome"], "answer": 0};
a choice follows the context as it stands, so it brings its own space. The likeliest is chosen
(acc), and the likeliest by the byte (acc_norm), as lm-evaluation-harness has it. --make_choices
writes such items from the validation text of the run's dataset, what really follows against what
stands elsewhere, and scores them; every run on that dataset gets the same.

The newest run in --out_dir is used, or the run or the checkpoint that --run names. A model with
components from a config file needs that file again, as for sample.py.
"""

import argparse
import json
import math
import random
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import checkpointing
import hardware
import resumption
from comparison_text import table
from errors import UserError, run_script
from evidence import CONFIDENCE, student_quantile
from model_builder import Transformer
from model_components import IGNORED
from text_codec import REPLACEMENT, Codec
from token_data import load_dataset

LOGIT_BYTES = 2**28  # of the logits of a batch, unless --batch_size says how many sequences it has
SHOWN_PROBLEMS = 5

# --make_choices: characters, at most half a context of a choice; choices; tokens to take them from.
# The seed is part of what the items are.
MADE_CONTEXT, MADE_CHOICE, MADE_CHOICES, MADE_FROM = 240, 40, 4, 2**20
MADE_SEED = 1337


def parse(argv: list[str]) -> argparse.Namespace:
    parser = resumption.checkpoint_parser('evaluate.py', __doc__)
    add = parser.add_argument
    several = {'type': Path, 'action': 'append', 'default': [], 'metavar': 'FILE'}
    add('--text', help='text to find the bits per byte of; may be given several times', **several)
    add('--choices', help='items to choose in; may be given several times', **several)
    add('--make_choices', type=Path, metavar='FILE', help='items to write first, and to score')
    add('--num_items', type=int, default=200, help='of --make_choices (default 200)')
    add('--stride', type=int, help='tokens scored in a window (default: half of block_size)')
    add('--batch_size', type=int, help='sequences at a time (default: what takes little memory)')
    add('--json', type=Path, metavar='FILE', help='write the results here, with those of each item')
    add('--device', default='auto', help='auto, cpu, cuda, cuda:N or mps (default auto)')
    add('--dtype', default='auto', help='auto, float32, bfloat16 or float16 (default auto)')
    options = parser.parse(argv)
    problems = [
        f'--{key}={value}: takes a number of at least 1.'
        for key, value in vars(options).items()
        if key in ('num_items', 'stride', 'batch_size') and value is not None and value < 1
    ]
    if not (options.text or options.choices or options.make_choices):
        problems.append(
            'nothing to evaluate: give --text=FILE, --choices=FILE.jsonl or '
            '--make_choices=FILE.jsonl.'
        )
    for key, path in (('make_choices', options.make_choices), ('json', options.json)):
        if path is not None and not path.parent.is_dir():
            problems.append(f'--{key}={path}: there is no folder {path.parent}.')
    if options.make_choices and options.make_choices.exists():
        problems.append(
            f'--make_choices={options.make_choices} is there already: --choices='
            f'{options.make_choices} scores it.'
        )
    resumption.read_components(options.config, problems)
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)
    device = hardware.select_device(options.device)
    dtype = hardware.resolve_dtype(options.dtype, device)
    checkpoint, state = resumption.find_checkpoint(options.out_dir, options.run)
    config = resumption.architecture_of(checkpoint)
    codec, _ = resumption.vocabulary_of(checkpoint)
    if options.make_choices:
        make_choices(options.make_choices, checkpoint, codec, options.num_items)
    stride = options.stride or max(1, config.block_size // 2)
    if stride > config.block_size:
        raise UserError(f'--stride={stride}: at most block_size={config.block_size} are scored.')
    texts = {path: read_text(path, codec) for path in options.text}
    paths = [*([options.make_choices] if options.make_choices else []), *options.choices]
    items = {path: read_items(path, codec, config.block_size) for path in paths}

    scorer = Scorer(
        resumption.load_model(checkpoint, state, device).eval(), device, dtype, options.batch_size
    )
    print(f'{config.name}, {checkpoint.iter:,} updates, from {checkpoint.path}, in {dtype}')
    read = [score_text(scorer, path, text, codec, stride) for path, text in texts.items()]
    chosen = [score_items(scorer, path, found) for path, found in items.items()]
    print('\n\n'.join(filter(None, (text_table(read), choice_table(chosen)))))
    if options.json:
        write_json(
            options.json,
            {
                'architecture': config.name,
                'checkpoint': str(checkpoint.path),
                'iter': checkpoint.iter,
                'dtype': dtype,
                'block_size': config.block_size,
                'stride': stride,
                'text': [asdict(result) for result in read],
                'choices': [asdict(result) for result in chosen],
            },
        )
    return 0


# --------------------------------------------------------------------------------------------------
# Likelihood


@dataclass(frozen=True)
class Span:
    """Tokens in a row, of which the last `scored` are scored and the others are context."""

    tokens: Sequence[int]  # at most block_size + 1
    scored: int


@dataclass
class Scorer:
    """A model that tells how likely tokens are; `dtype` is that of its matrix multiplications."""

    model: Transformer
    device: torch.device
    dtype: str
    batch_size: int | None

    @torch.no_grad()
    def nats(self, spans: Sequence[Span]) -> list[float]:
        """-log p of the scored tokens of each span, given all tokens before them in it."""
        # Of like length together, so that little is padding.
        order = sorted(range(len(spans)), key=lambda i: len(spans[i].tokens))
        found = [0.0] * len(spans)
        while order:
            longest = len(spans[order[-1]].tokens) - 1
            row_bytes = longest * self.model.config.vocab_size * 4
            size = self.batch_size or max(1, LOGIT_BYTES // row_bytes)
            chosen, order = order[-size:], order[:-size]
            for i, value in zip(chosen, self._batch([spans[i] for i in chosen], longest)):
                found[i] = value
        return found

    def _batch(self, spans: Sequence[Span], length: int) -> list[float]:
        tokens = torch.zeros(len(spans), length, dtype=torch.long)
        targets = torch.full_like(tokens, IGNORED)
        for row, span in enumerate(spans):
            # Padding stands behind, where a causal model does not see it.
            ids = torch.from_numpy(np.asarray(span.tokens, dtype=np.int64))
            tokens[row, : len(ids) - 1] = ids[:-1]
            targets[row, len(ids) - 1 - span.scored : len(ids) - 1] = ids[-span.scored :]
        tokens, targets = tokens.to(self.device), targets.to(self.device)
        with hardware.autocast(self.device, self.dtype):
            logits = self.model(tokens)  # (N, T, V)
        each = F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction='none', ignore_index=IGNORED
        )
        return each.view(targets.shape).cpu().double().sum(dim=1).tolist()


# --------------------------------------------------------------------------------------------------
# Bits per byte


@dataclass(frozen=True)
class TextResult:
    """What was measured on one text; the first token, which has nothing before it, is left out."""

    file: str
    bits_per_byte: float
    half_interval: float | None  # 95 %, over the windows; of a single one there is none
    perplexity: float  # a token
    nats: float
    tokens: int
    bytes: int
    windows: int


def read_text(path: Path, codec: Codec) -> np.ndarray:
    """The tokens of a file. Raises UserError."""
    try:
        tokens = codec.encode_array(path.read_bytes().decode('utf-8'))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'--text={path} cannot be read as UTF-8: {error}.') from error
    except UserError as error:
        raise UserError(*(f'--text={path}: {problem}' for problem in error.problems)) from error
    if len(tokens) < 2:
        raise UserError(f'--text={path} has {len(tokens)} token(s), and two are the least.')
    return tokens


def windows(tokens: np.ndarray, block_size: int, stride: int) -> Iterator[Span]:
    """Every token but the first is scored in one of them, `stride` at a time after the first."""
    done = 1
    while done < len(tokens):
        end = min(done + (block_size if done == 1 else stride), len(tokens))
        start = max(0, end - block_size - 1)
        yield Span(tokens[start:end], end - done)
        done = end


def score_text(
    scorer: Scorer, path: Path, tokens: np.ndarray, codec: Codec, stride: int
) -> TextResult:
    spans = list(windows(tokens, scorer.model.config.block_size, stride))
    nats = scorer.nats(spans)
    sizes = [sum(len(codec.bytes_of(t)) for t in span.tokens[-span.scored :]) for span in spans]
    bits = [value / math.log(2) for value in nats]
    rate = math.fsum(bits) / sum(sizes)
    count = sum(span.scored for span in spans)
    return TextResult(
        file=str(path),
        bits_per_byte=rate,
        half_interval=half_interval(bits, sizes),
        perplexity=math.exp(math.fsum(nats) / count),
        nats=math.fsum(nats),
        tokens=count,
        bytes=sum(sizes),
        windows=len(spans),
    )


def half_interval(amounts: Sequence[float], sizes: Sequence[int]) -> float | None:
    """Of Σ amounts / Σ sizes over blocks: the ratio estimator's (Cochran 1977, section 2.11)."""
    count = len(amounts)
    if count < 2:
        return None
    rate = math.fsum(amounts) / sum(sizes)
    squares = math.fsum((a - rate * s) ** 2 for a, s in zip(amounts, sizes))
    error = math.sqrt(count / (count - 1) * squares) / sum(sizes)
    return student_quantile(0.5 + CONFIDENCE / 2, count - 1) * error


# --------------------------------------------------------------------------------------------------
# Multiple choice


@dataclass(frozen=True)
class Item:
    """One question: what each choice is with its context, its bytes, and which one is right."""

    line: int
    spans: list[Span]
    sizes: list[int]
    answer: int


@dataclass(frozen=True)
class ChoiceResult:
    """The part of the items where the right choice was the likeliest, by itself and by the byte."""

    file: str
    acc: float
    acc_stderr: float | None  # of a single item there is none
    acc_norm: float
    acc_norm_stderr: float | None
    chance: float
    items: int
    each: list[dict]  # line, answer, log_likelihoods and bytes of the choices


def read_items(path: Path, codec: Codec, block_size: int) -> list[Item]:
    """The items of a .jsonl file. Raises UserError naming the first lines that are none."""
    try:
        lines = path.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'--choices={path} cannot be read: {error}.') from error
    items, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            items.append(read_item(number, line, codec, block_size))
        except UserError as error:
            problems += [f'--choices={path}, line {number}: {p}' for p in error.problems]
        if len(problems) >= SHOWN_PROBLEMS:
            break
    if problems:
        raise UserError(*problems)
    if not items:
        raise UserError(f'--choices={path} has no items.')
    return items


def read_item(number: int, line: str, codec: Codec, block_size: int) -> Item:
    """One line. Raises UserError."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(f'it is no JSON: {error}.') from error
    context, choices, answer = (
        found.get(key) if isinstance(found, dict) else None
        for key in ('context', 'choices', 'answer')
    )
    if not (
        isinstance(context, str)
        and isinstance(choices, list)
        and len(choices) >= 2
        and all(isinstance(choice, str) and choice for choice in choices)
        and type(answer) is int
        and 0 <= answer < len(choices)
    ):
        raise UserError(
            'an item is {"context": "…", "choices": ["…", "…"], "answer": 0}, with two or more '
            'choices, none of them empty, and the number of the right one, from 0.'
        )
    spans = [choice_span(codec, context, choice, block_size) for choice in choices]
    return Item(number, spans, [len(choice.encode()) for choice in choices], answer)


def choice_span(codec: Codec, context: str, choice: str, block_size: int) -> Span:
    """The choice's tokens after the context's, the last block_size + 1 of all.

    As lm-evaluation-harness has it: spaces at the context's end belong to the choice, since a token
    of byte pairs begins with its space. Raises UserError.
    """
    bare = context.rstrip()
    before = codec.encode(bare)
    tokens = codec.encode(context + choice)
    if not before:
        if codec.end_of_text is None:
            raise UserError(
                'its context is empty, and this vocabulary has no token that stands between texts.'
            )
        before, tokens = [codec.end_of_text], [codec.end_of_text, *tokens]
    scored = len(tokens) - len(before)
    if not 0 < scored <= block_size:
        raise UserError(
            f'its choice {choice[:40]!r} makes {scored} tokens, and 1 to block_size={block_size} '
            f'can be scored.'
        )
    return Span(tokens[-block_size - 1 :], scored)


def score_items(scorer: Scorer, path: Path, items: list[Item]) -> ChoiceResult:
    nats = iter(scorer.nats([span for item in items for span in item.spans]))
    each = [
        {
            'line': item.line,
            'answer': item.answer,
            'log_likelihoods': [-next(nats) for _ in item.spans],
            'bytes': item.sizes,
        }
        for item in items
    ]
    right = [float(likeliest(e['log_likelihoods']) == e['answer']) for e in each]
    right_norm = [
        float(
            likeliest([value / size for value, size in zip(e['log_likelihoods'], e['bytes'])])
            == e['answer']
        )
        for e in each
    ]
    return ChoiceResult(
        file=str(path),
        acc=statistics.fmean(right),
        acc_stderr=standard_error(right),
        acc_norm=statistics.fmean(right_norm),
        acc_norm_stderr=standard_error(right_norm),
        chance=statistics.fmean(1 / len(item.spans) for item in items),
        items=len(items),
        each=each,
    )


def likeliest(values: Sequence[float]) -> int:
    """The number of the largest; of equal ones the first."""
    return max(range(len(values)), key=values.__getitem__)


def standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


# --------------------------------------------------------------------------------------------------
# Items from the validation text


def make_choices(
    path: Path, checkpoint: checkpointing.Checkpoint, codec: Codec, count: int
) -> None:
    """Write `count` items from the validation split of the run's dataset. Raises UserError."""
    config = checkpoint.index['config']
    dataset = load_dataset(config['dataset'], config['block_size'])
    split = dataset.splits['val']
    tokens = split.read(0, min(len(split), MADE_FROM))
    end, parts = dataset.end_of_text, [tokens]
    if end is not None:
        parts = [part[part != end] for part in np.split(tokens, np.flatnonzero(tokens == end))]
    documents = [codec.decode(part) for part in parts]
    items = items_from(documents, count, min(MADE_CHOICE, config['block_size'] // 2))
    if len(items) < count:
        way = f': --num_items={len(items)}' if items else ''
        raise UserError(
            f'--make_choices={path}: the validation text of {config["dataset"]} is enough for '
            f'{len(items)} items{way}.'
        )
    lines = [json.dumps(item, ensure_ascii=False) + '\n' for item in items]
    write_file(path, ''.join(lines), 'make_choices')


def items_from(documents: Sequence[str], count: int, width: int = MADE_CHOICE) -> list[dict]:
    """`count` items, or as many as there can be, with choices of `width` characters.

    A context and what really follows are of one document, divided between two words.
    """
    places = [
        (document, at)
        for document, text in enumerate(documents)
        for at in (match.start() for match in re.finditer(r'(?<=\S)\s(?=\S)', text))
        if MADE_CONTEXT <= at <= len(text) - width
        and REPLACEMENT not in text[at - MADE_CONTEXT : at + width]
    ]
    choose = random.Random(MADE_SEED)
    choose.shuffle(places)

    def text_at(place: tuple[int, int], before: int, after: int) -> str:
        document, at = place
        return documents[document][at - before : at + after]

    items = []
    for place in places:
        context, truth = text_at(place, MADE_CONTEXT, 0), text_at(place, 0, width)
        others = {}
        for other in choose.sample(places, min(len(places), 8 * MADE_CHOICES)):
            apart = abs(other[1] - place[1]) >= MADE_CONTEXT + width
            text = text_at(other, 0, width)
            if (other[0] != place[0] or apart) and text != truth:
                others[text] = None
        if len(others) < MADE_CHOICES - 1:
            continue
        choices = list(others)[: MADE_CHOICES - 1]
        answer = choose.randrange(MADE_CHOICES)
        choices.insert(answer, truth)
        items.append({'context': context, 'choices': choices, 'answer': answer})
        if len(items) == count:
            break
    return items


# --------------------------------------------------------------------------------------------------
# Results


def text_table(results: Sequence[TextResult]) -> str:
    if not results:
        return ''
    header = ('text', 'bits/byte', f'± {CONFIDENCE:.0%}', 'perplexity', 'tokens', 'bytes')
    rows = [
        (
            result.file,
            f'{result.bits_per_byte:.4f}',
            '-' if result.half_interval is None else f'{result.half_interval:.4f}',
            f'{result.perplexity:,.2f}',
            f'{result.tokens:,}',
            f'{result.bytes:,}',
        )
        for result in results
    ]
    return table([header, *rows], '<>>>>>')


def choice_table(results: Sequence[ChoiceResult]) -> str:
    if not results:
        return ''
    header = ('choices', 'acc', '± error', 'acc_norm', '± error', 'chance', 'items')
    rows = [
        (
            result.file,
            f'{result.acc:.4f}',
            '-' if result.acc_stderr is None else f'{result.acc_stderr:.4f}',
            f'{result.acc_norm:.4f}',
            '-' if result.acc_norm_stderr is None else f'{result.acc_norm_stderr:.4f}',
            f'{result.chance:.4f}',
            f'{result.items:,}',
        )
        for result in results
    ]
    return table([header, *rows], '<>>>>>>')


def write_json(path: Path, results: dict) -> None:
    write_file(path, json.dumps(results, indent=2, ensure_ascii=False) + '\n', 'json')


def write_file(path: Path, text: str, option: str) -> None:
    """Raises UserError."""
    try:
        path.write_text(text, encoding='utf-8')
    except OSError as error:
        raise UserError(f'--{option}={path} cannot be written: {error.strerror}.') from error


if __name__ == '__main__':
    run_script(main, sys.argv[1:])
