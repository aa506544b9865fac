"""How likely a model finds text: bits per byte, and the choices of questions."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import hardware
from common.errors import UserError
from comparison.significance import CONFIDENCE, student_quantile
from data.tokenizer import Tokenizer
from model_builder import Transformer
from model_components import IGNORED

LOGIT_BYTES = 2**28  # of the logits of a batch, unless it is said how many sequences it has


@dataclass(frozen=True)
class TokenSpan:
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
    def nats(self, spans: Sequence[TokenSpan]) -> list[float]:
        """-log p of the scored tokens of each span, given all tokens before them in it."""
        # Of like length together, so that little is padding.
        order = sorted(range(len(spans)), key=lambda i: len(spans[i].tokens))
        nats = [0.0] * len(spans)
        while order:
            longest = len(spans[order[-1]].tokens) - 1
            row_bytes = longest * self.model.config.vocab_size * 4
            size = self.batch_size or max(1, LOGIT_BYTES // row_bytes)
            chosen, order = order[-size:], order[:-size]
            for i, value in zip(chosen, self._batch([spans[i] for i in chosen], longest)):
                nats[i] = value
        if not_finite := [value for value in nats if not math.isfinite(value)]:
            raise UserError(
                f'The model gives {len(not_finite):,} of {len(nats):,} texts a likelihood that '
                'is no number. Its weights are damaged or their training diverged, or '
                'dtype=float16 is too narrow for them: try --dtype=float32.'
            )
        return nats

    def _batch(self, spans: Sequence[TokenSpan], length: int) -> list[float]:
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
    perplexity: float | None  # a token; None where it is larger than any number here
    nats: float
    tokens: int
    bytes: int
    windows: int


def windows(tokens: np.ndarray, block_size: int, stride: int) -> Iterator[TokenSpan]:
    """Every token but the first is scored in one of them, `stride` at a time after the first."""
    done = 1
    while done < len(tokens):
        end = min(done + (block_size if done == 1 else stride), len(tokens))
        start = max(0, end - block_size - 1)
        yield TokenSpan(tokens[start:end], end - done)
        done = end


def score_text(
    scorer: Scorer, path: Path, tokens: np.ndarray, tokenizer: Tokenizer, stride: int
) -> TextResult:
    spans = list(windows(tokens, scorer.model.config.block_size, stride))
    nats = scorer.nats(spans)
    sizes = [
        sum(len(tokenizer.token_bytes(t)) for t in span.tokens[-span.scored :]) for span in spans
    ]
    bits = [value / math.log(2) for value in nats]
    rate = math.fsum(bits) / sum(sizes)
    count = sum(span.scored for span in spans)
    return TextResult(
        file=str(path),
        bits_per_byte=rate,
        half_interval=half_interval(bits, sizes),
        perplexity=perplexity(math.fsum(nats) / count),
        nats=math.fsum(nats),
        tokens=count,
        bytes=sum(sizes),
        windows=len(spans),
    )


def perplexity(nats: float) -> float | None:
    """exp(nats); None where that is larger than any number here."""
    try:
        return math.exp(nats)
    except OverflowError:
        return None


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
    """One question: each choice behind its context, how long it is, and which one is right."""

    line: int
    spans: list[TokenSpan]
    choices: list[str]
    answer: int


@dataclass(frozen=True)
class ChoiceResult:
    """The part of the items where the right choice was the likeliest.

    By itself (acc), by the character (acc_norm) and by the byte of UTF-8 (acc_bytes), with the
    standard errors, of which a single item has none.
    """

    file: str
    acc: float
    acc_stderr: float | None
    acc_norm: float
    acc_norm_stderr: float | None
    acc_bytes: float
    acc_bytes_stderr: float | None
    chance: float
    items: int
    each: list[dict]  # line, answer; log_likelihoods, bytes and characters of the choices


def score_items(scorer: Scorer, path: Path, items: list[Item]) -> ChoiceResult:
    nats = iter(scorer.nats([span for item in items for span in item.spans]))
    each = [
        {
            'line': item.line,
            'answer': item.answer,
            'log_likelihoods': [-next(nats) for _ in item.spans],
            'bytes': [len(choice.encode()) for choice in item.choices],
            'characters': [len(choice) for choice in item.choices],
        }
        for item in items
    ]
    accuracies: dict = {}
    for key, length in (('acc', None), ('acc_norm', 'characters'), ('acc_bytes', 'bytes')):
        right = [float(likeliest(result, length) == result['answer']) for result in each]
        accuracies |= {key: statistics.fmean(right), f'{key}_stderr': standard_error(right)}
    return ChoiceResult(
        file=str(path),
        **accuracies,
        chance=statistics.fmean(1 / len(item.spans) for item in items),
        items=len(items),
        each=each,
    )


def likeliest(result: dict, length: str | None) -> int:
    """The number of the likeliest choice, by its `length` if given; of equal ones the first."""
    values = result['log_likelihoods']
    if length is not None:
        values = [value / size for value, size in zip(values, result[length])]
    return max(range(len(values)), key=values.__getitem__)


def standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
