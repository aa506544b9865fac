"""Sampling of tokens, decoding them to text as they arrive, and the periodic sample of a run."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from common.errors import UserError
from components.weight_initialization import name_seed
from data.dataset import TokenDataset
from data.tokenizer import REPLACEMENT, Tokenizer
from inference.generate import generate
from model_builder import Transformer
from records.record_types import Sample
from training_config import TrainingConfig

TEMPERATURE, TOP_K = 0.8, 200  # defaults


class NoTokenToSample(UserError):
    """The logits are not finite, so no token can be sampled."""


@dataclass(frozen=True)
class Sampler:
    """Samples tokens from logits: (B, V) -> (B,) int64.

    vocab_size: number of tokens of the tokenizer; the model's padding tokens are never sampled.
    temperature: divisor of the logits; 0: the most likely token, regardless of the filters.
    top_k: keep the k most likely tokens, and ties with the last; 0: all (Fan et al. 2018).
    top_p: keep the fewest of these whose total probability is at least top_p; 1: all
    (Holtzman et al. 2020).
    min_p: keep those of these whose probability is at least min_p times the highest; 0: all
    (Nguyen et al. 2024).
    generator: CPU generators, one for all rows or one per row. A row uses one random number per
    token, so a row with its own generator gives the same tokens in any batch.

    Raises NoTokenToSample for logits that are not finite.
    """

    vocab_size: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    generator: torch.Generator | Sequence[torch.Generator] | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits[:, : self.vocab_size].float()
        highest = logits.amax(dim=-1, keepdim=True)
        if not highest.isfinite().all():
            raise NoTokenToSample(
                f'no token can be sampled: the highest logit is {_first_not_finite(highest)}. The '
                'weights are damaged, their training diverged, or they exceed the range of '
                'float16. Try --dtype=float32.'
            )
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        temperature = max(self.temperature, torch.finfo(logits.dtype).tiny)
        scores = (logits - highest) / temperature
        # MPS has no float64, and CUDA no deterministic cumulative sum.
        if scores.device.type == 'mps' or torch.are_deterministic_algorithms_enabled():
            scores = scores.cpu()
        scores = self.filter_scores(scores)
        return self.draw(scores.double().softmax(dim=-1)).to(logits.device)

    def filter_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V), at most 0 in each row, with -inf for the tokens that are filtered out."""
        if 0 < self.top_k < scores.size(-1):
            least = scores.topk(self.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        if self.top_p < 1:
            ascending, indices = scores.sort()
            left_out = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - self.top_p
            left_out[:, -1] = False
            scores = scores.masked_fill(left_out.scatter(1, indices, left_out), -math.inf)
        if self.min_p > 0:
            scores = scores.masked_fill(scores < math.log(self.min_p), -math.inf)
        return scores

    def draw(self, probabilities: torch.Tensor) -> torch.Tensor:
        """One token per row of (B, V), by inverting the cumulative distribution function."""
        reached = probabilities.cumsum(dim=-1)
        # A target in (0, 1], and the first token to reach it: never one of probability 0.
        target = 1 - self.uniform(len(reached)).to(reached.device)
        return torch.searchsorted(reached, target[:, None] * reached[:, -1:])[:, 0]

    def uniform(self, rows: int) -> torch.Tensor:
        """A random number in [0, 1) for each row."""
        if isinstance(self.generator, Sequence):
            assert len(self.generator) == rows, (len(self.generator), rows)
            numbers = [torch.rand((), generator=g, dtype=torch.float64) for g in self.generator]
            return torch.stack(numbers)
        return torch.rand(rows, generator=self.generator, dtype=torch.float64)


def _first_not_finite(values: torch.Tensor) -> float:
    return values[~values.isfinite()][0].item()


class TextStream:
    """Decodes one sample token by token into whole characters, up to a stop string or the end.

    decode: token ids -> text. stops: the text ends before the first complete stop string, even
    within a token. end_of_text: the token that ends a sample and is not part of its text.
    """

    def __init__(
        self,
        decode: Callable[[Iterable[int]], str],
        stops: Sequence[str] = (),
        end_of_text: int | None = None,
    ):
        self.decode, self.stops, self.end_of_text = decode, stops, end_of_text
        self.text = ''  # the final part of the text
        self.ended = False
        self._pending: list[int] = []  # tokens since the last complete character
        self._taken = 0  # number of their characters that are already used
        self._held_back = ''  # text that may be the beginning of a stop string

    def add(self, token: int) -> str:
        """Add a token. Returns the text that has become final."""
        if self.ended:
            return ''
        if token == self.end_of_text:
            return self.finish()
        self._pending.append(token)
        text = self.decode(self._pending)
        if text.endswith(REPLACEMENT):  # possibly the first bytes of a character
            return self._take(text[:-1])
        fresh = self._take(text)
        self._pending, self._taken = [], 0
        return fresh

    def finish(self) -> str:
        """End the sample. Returns the rest of its text."""
        if self.ended:
            return ''
        fresh = self._take(self.decode(self._pending))
        if not self.ended:
            fresh, self.ended = fresh + self._held_back, True
            self.text += self._held_back
        return fresh

    def _take(self, text: str) -> str:
        """The text that has become final, given that the pending tokens begin with `text`."""
        candidate, self._taken = self._held_back + text[self._taken :], len(text)
        matches = [(candidate.find(stop) + len(stop), candidate.find(stop)) for stop in self.stops]
        complete = [(end, begin) for end, begin in matches if begin >= 0]
        if complete:
            self.ended, certain = True, min(complete)[1]
        else:
            certain = len(candidate) - max(
                (partial_match_length(stop, candidate) for stop in self.stops), default=0
            )
        fresh, self._held_back = candidate[:certain], candidate[certain:]
        self.text += fresh
        return fresh


def partial_match_length(stop: str, text: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


# --------------------------------------------------------------------------------------------------
# Prompts, random numbers, and the periodic sample of a run


def sample_generator(seed: int, number: int) -> torch.Generator:
    """The random numbers of sample `number`."""
    return torch.Generator().manual_seed(name_seed(seed, f'sample/{number}'))


def prompt_tokens(tokenizer: Tokenizer, prompt: str, option: str) -> list[int]:
    """The token ids of the prompt; of an empty one the end-of-text token.

    option: the prompt's name in error messages. Raises UserError for characters outside the
    vocabulary, and for an empty prompt if there is no end-of-text token.
    """
    tokens = [int(token) for token in tokenizer.encode(prompt)]
    if not tokens and tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    if not tokens:
        raise UserError(
            f'{option} is empty, and this vocabulary has no end-of-text token to start from: give '
            f"the beginning of the text, such as {option}='The '."
        )
    return tokens


@dataclass(frozen=True)
class PeriodicSample:
    """The sample that a run generates at evaluations, always with the same random numbers.

    It equals the first sample of sample.py with the same prompt and seed.
    """

    prompt: str
    tokens: list[int]  # the prompt's
    tokenizer: Tokenizer
    vocab_size: int
    max_new_tokens: int
    seed: int

    @classmethod
    def from_options(cls, run: TrainingConfig, dataset: TokenDataset) -> 'PeriodicSample | None':
        """The sample that the options request, if any. Raises UserError if the dataset has no
        tokenizer that can encode the prompt."""
        if run.sample_interval == 0:
            return None
        try:
            tokenizer = Tokenizer(dataset.tokenizer, dataset.folder)
            tokens = prompt_tokens(tokenizer, run.sample_prompt, '--sample_prompt')
        except UserError as error:
            raise UserError(
                f'sample_interval={run.sample_interval}: no text can be generated '
                f'(--sample_interval=0 disables samples). {error}'
            ) from error
        counts = dataset.vocab_size, run.sample_tokens
        return cls(run.sample_prompt, tokens, tokenizer, *counts, run.seed)

    def write(self, model: Transformer) -> Sample:
        """An entry of the record: `prompt`, `text` (None: logits not finite) and `time_ms`.

        The model must be in evaluation mode. Every rank calls this, and makes the same number of
        forward passes.
        """
        began = time.perf_counter()
        device = next(model.parameters()).device
        choose = Sampler(
            self.vocab_size, TEMPERATURE, TOP_K, generator=[sample_generator(self.seed, number=0)]
        )
        prompt = torch.tensor([self.tokens[-model.config.block_size :]], device=device)
        text = TextStream(self.tokenizer.decode, end_of_text=self.tokenizer.end_of_text)
        try:
            for token in generate(model, prompt, self.max_new_tokens, choose=choose):
                text.add(token.item())
            text.finish()
            written = text.text
        except NoTokenToSample:
            written = None
        seconds = time.perf_counter() - began
        return {'prompt': self.prompt, 'text': written, 'time_ms': seconds * 1e3}
