"""Likelihood of text under a model: bits per byte, and multiple-choice accuracy."""

import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import hardware
from common.errors import UserError
from common.progress_bar import ProgressBar
from common.student import student_quantile
from comparison.significance import CONFIDENCE
from data.tokenizer import Tokenizer
from model_builder import Transformer
from model_components import IGNORED

LOGIT_BYTES = 2**28  # of a batch's logits, if no batch size is given


@dataclass(frozen=True)
class TokenSpan:
    """Consecutive tokens; the last `scored` are scored, the others are context."""

    tokens: Sequence[int]  # at most block_size + 1
    scored: int


@dataclass
class Scorer:
    """A model that scores tokens. dtype: of the matrix products."""

    model: Transformer
    device: torch.device
    dtype: str
    batch_size: int | None

    @torch.no_grad()
    def nats(self, spans: Sequence[TokenSpan], title: str = 'Scoring') -> list[float]:
        """-log p of the scored tokens of each span, given all tokens before them in the span.

        title: of the progress bar on standard error.
        """
        # Batches of similar lengths need little padding.
        order = sorted(range(len(spans)), key=lambda i: len(spans[i].tokens))
        nats = [0.0] * len(spans)
        with ProgressBar(title, len(spans), unit='sequences', stream=sys.stderr) as bar:
            while order:
                longest = len(spans[order[-1]].tokens) - 1
                row_bytes = longest * self.model.config.vocab_size * 4
                size = self.batch_size or max(1, LOGIT_BYTES // row_bytes)
                chosen, order = order[-size:], order[:-size]
                for i, value in zip(chosen, self._batch([spans[i] for i in chosen], longest)):
                    nats[i] = value
                bar.advance(len(chosen))
        if not_finite := [value for value in nats if not math.isfinite(value)]:
            raise UserError(
                f'the likelihood of {len(not_finite):,} of {len(nats):,} sequences is not finite. '
                'The weights are damaged, their training diverged, or they exceed the range of '
                'float16. Try --dtype=float32.'
            )
        return nats

    def _batch(self, spans: Sequence[TokenSpan], length: int) -> list[float]:
        tokens = torch.zeros(len(spans), length, dtype=torch.long)
        targets = torch.full_like(tokens, IGNORED)
        for row, span in enumerate(spans):
            # Padding comes last, where a causal model does not see it.
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
    """The results for one text. Its first token has no context and is not scored."""

    file: str
    bits_per_byte: float
    half_interval: float | None  # 95 %, over the windows; None for a single window
    perplexity: float | None  # per token; None on overflow
    nats: float
    tokens: int
    bytes: int
    windows: int


def windows(tokens: np.ndarray, context: int, stride: int) -> Iterator[TokenSpan]:
    """Windows that score every token but the first once, `stride` tokens per window after the
    first window."""
    done = 1
    while done < len(tokens):
        end = min(done + (context if done == 1 else stride), len(tokens))
        start = max(0, end - context - 1)
        yield TokenSpan(tokens[start:end], end - done)
        done = end


def score_text(
    scorer: Scorer, path: Path, tokens: np.ndarray, tokenizer: Tokenizer, context: int, stride: int
) -> TextResult:
    """Score a text with overlapping windows of `context` tokens. Raises UserError."""
    spans = list(windows(tokens, context, stride))
    nats = scorer.nats(spans, path.name)
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
    """exp(nats); None on overflow."""
    try:
        return math.exp(nats)
    except OverflowError:
        return None


def half_interval(amounts: Sequence[float], sizes: Sequence[int]) -> float | None:
    """Half the confidence interval of Σ amounts / Σ sizes over blocks, as a ratio estimator
    (Cochran 1977, section 2.11); None for a single block."""
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
    """One question: the context with each choice, the choices, and the number of the answer."""

    line: int
    spans: list[TokenSpan]
    choices: list[str]
    answer: int


@dataclass(frozen=True)
class ChoiceResult:
    """The fraction of items whose correct choice has the highest log-likelihood.

    The log-likelihood as such (acc), per character (acc_norm) or per UTF-8 byte (acc_bytes), with
    standard errors (None for a single item).
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
    """Score the choices of all items. Raises UserError."""
    nats = iter(scorer.nats([span for item in items for span in item.spans], path.name))
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
    """The number of the most likely choice, per unit of `length` if given; of ties the first."""
    values = result['log_likelihoods']
    if length is not None:
        values = [value / size for value, size in zip(values, result[length])]
    return max(range(len(values)), key=values.__getitem__)


def standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
