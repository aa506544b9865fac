"""Multiple-choice items: read from JSON lines, or generated from a dataset's validation text."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.text_files import parse_json, read_lines
from data.dataset import TokenDataset
from data.tokenizer import REPLACEMENT, Tokenizer
from inference.scoring import Item, TokenSpan

MAX_PROBLEMS = 5

# Length of a context and of a choice in characters (a choice: at most half of block_size), choices
# per item, tokens of validation text to read. The seed is part of the items' definition.
CONTEXT_CHARACTERS, CHOICE_CHARACTERS, CHOICES_PER_ITEM, SOURCE_TOKENS = 240, 40, 4, 2**20
ITEM_SEED = 1337


def read_items(path: Path, tokenizer: Tokenizer, block_size: int) -> list[Item]:
    """The items of a .jsonl file. Raises UserError naming the first invalid lines."""
    items, problems = [], []
    for number, line in read_lines(path, f'--choices={path}'):
        try:
            items.append(read_item(number, line, tokenizer, block_size))
        except UserError as error:
            problems += [f'--choices={path}, line {number}: {p}' for p in error.problems]
        if len(problems) >= MAX_PROBLEMS:
            break
    if problems:
        raise UserError(*problems)
    if not items:
        raise UserError(f'--choices={path} contains no items.')
    return items


def read_item(number: int, line: bytes, tokenizer: Tokenizer, block_size: int) -> Item:
    """The item in one line of a .jsonl file. Raises UserError."""
    try:
        item = parse_json(line)
    except ValueError as error:
        raise UserError(f'not JSON: {error}.') from error
    context, choices, answer = (
        item.get(key) if isinstance(item, dict) else None
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
            'an item must be {"context": "…", "choices": ["…", "…"], "answer": 0}, with two or '
            'more non-empty choices and the number of the correct one, counted from 0.'
        )
    spans = [choice_span(tokenizer, context, choice, block_size) for choice in choices]
    return Item(number, spans, choices, answer)


def choice_span(tokenizer: Tokenizer, context: str, choice: str, block_size: int) -> TokenSpan:
    """The tokens of the context and the choice, cut to the last block_size + 1.

    As in lm-evaluation-harness, spaces at the end of the context count as part of the choice, since
    a BPE token begins with its space. Raises UserError.
    """
    bare = context.rstrip()
    before = tokenizer.encode(bare)
    tokens = tokenizer.encode(context + choice)
    if not before:
        if tokenizer.end_of_text is None:
            raise UserError(
                'its context is empty, and this vocabulary has no end-of-text token to start from.'
            )
        before, tokens = [tokenizer.end_of_text], [tokenizer.end_of_text, *tokens]
    scored = len(tokens) - len(before)
    if not 0 < scored <= block_size:
        raise UserError(
            f'its choice {choice[:40]!r} has {scored} tokens; it must have 1 to '
            f'block_size={block_size}.'
        )
    return TokenSpan(tokens[-block_size - 1 :], scored)


def generate_items(dataset: TokenDataset, tokenizer: Tokenizer, count: int) -> str:
    """JSON lines of `count` items from the validation split. Raises UserError."""
    split = dataset.splits['val']
    tokens = split.read(0, min(len(split), SOURCE_TOKENS))
    end, parts = dataset.end_of_text, [tokens]
    if end is not None:
        parts = [part[part != end] for part in np.split(tokens, np.flatnonzero(tokens == end))]
    documents = [tokenizer.decode(part) for part in parts]
    items = items_from_documents(documents, count, min(CHOICE_CHARACTERS, dataset.block_size // 2))
    if len(items) < count:
        advice = f': use --num_items={len(items)}' if items else ''
        raise UserError(
            f'the validation text of {dataset.folder} is enough for {len(items)} items{advice}.'
        )
    return ''.join(json.dumps(item, ensure_ascii=False) + '\n' for item in items)


def items_from_documents(
    documents: Sequence[str], count: int, width: int = CHOICE_CHARACTERS
) -> list[dict]:
    """`count` items, or as many as the text allows, with choices of `width` characters.

    A context and its correct continuation are adjacent in one document, split between two words.
    """
    positions = [
        (document, at)
        for document, text in enumerate(documents)
        for at in (match.start() for match in re.finditer(r'(?<=\S)\s(?=\S)', text))
        if CONTEXT_CHARACTERS <= at <= len(text) - width
        and REPLACEMENT not in text[at - CONTEXT_CHARACTERS : at + width]
    ]
    choose = random.Random(ITEM_SEED)
    choose.shuffle(positions)

    def text_at(position: tuple[int, int], before: int, after: int) -> str:
        document, at = position
        return documents[document][at - before : at + after]

    items = []
    for position in positions:
        context, truth = text_at(position, CONTEXT_CHARACTERS, 0), text_at(position, 0, width)
        others: dict[str, None] = {}
        for other in choose.sample(positions, min(len(positions), 8 * CHOICES_PER_ITEM)):
            apart = abs(other[1] - position[1]) >= CONTEXT_CHARACTERS + width
            text = text_at(other, 0, width)
            if (other[0] != position[0] or apart) and text != truth:
                others[text] = None
        if len(others) < CHOICES_PER_ITEM - 1:
            continue
        choices = list(others)[: CHOICES_PER_ITEM - 1]
        answer = choose.randrange(CHOICES_PER_ITEM)
        choices.insert(answer, truth)
        items.append({'context': context, 'choices': choices, 'answer': answer})
        if len(items) == count:
            break
    return items
