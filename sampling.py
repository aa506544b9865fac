"""Which token comes next, and what text the tokens make as they come.

Knows no model: `Sampler` is what `model_builder.generate` asks for each token.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from errors import UserError
from text_codec import REPLACEMENT


@dataclass(frozen=True)
class Sampler:
    """Draws tokens by their probability: logits (B, V) -> (B,) int64.

    vocab_size: the data's; the padding of the table above it is never drawn.
    temperature: what the logits are divided by; 0 takes the likeliest token, filters or not.
    top_k: keep the k likeliest, and those as likely as the last of them; 0: all (Fan et al. 2018).
    top_p: of these keep the fewest that have at least this probability together; 1: all
    (Holtzman et al. 2020).
    min_p: of these keep those that are at least this part as likely as the likeliest; 0: all
    (Nguyen et al. 2024).
    generator: on the CPU, one for all rows or one for each; a row takes one number a token from
    it, so that a row with a generator of its own is drawn the same in whatever batch it is.

    Raises UserError for logits that leave nothing to draw from.
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
            raise UserError(
                f'No token can be drawn: the highest logit is {_first_not_finite(highest)}. The '
                'weights are damaged or their training diverged, or dtype=float16 is too narrow '
                'for them: try --dtype=float32.'
            )
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        temperature = max(self.temperature, torch.finfo(logits.dtype).tiny)
        scores = self.filtered((logits - highest) / temperature)
        if scores.device.type == 'mps':  # which has no float64
            scores = scores.cpu()
        return self.drawn(scores.double().softmax(dim=-1)).to(logits.device)

    def filtered(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V), 0 at the highest of each row, with -inf for what is not to be drawn."""
        if 0 < self.top_k < scores.size(-1):
            least = scores.topk(self.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, -math.inf)
        if self.top_p < 1:
            ascending, places = scores.sort()
            left_out = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - self.top_p
            left_out[:, -1] = False
            scores = scores.masked_fill(left_out.scatter(1, places, left_out), -math.inf)
        if self.min_p > 0:
            scores = scores.masked_fill(scores < math.log(self.min_p), -math.inf)
        return scores

    def drawn(self, probabilities: torch.Tensor) -> torch.Tensor:
        """One token of each row (B, V), by inverting the distribution function."""
        reached = probabilities.cumsum(dim=-1)
        # In (0, 1], and the first place that reaches it: never one of probability 0.
        target = 1 - self.uniform(len(reached)).to(reached.device)
        return torch.searchsorted(reached, target[:, None] * reached[:, -1:])[:, 0]

    def uniform(self, rows: int) -> torch.Tensor:
        """A number in [0, 1) for each row."""
        if isinstance(self.generator, Sequence):
            assert len(self.generator) == rows, (len(self.generator), rows)
            numbers = [torch.rand((), generator=g, dtype=torch.float64) for g in self.generator]
            return torch.stack(numbers)
        return torch.rand(rows, generator=self.generator, dtype=torch.float64)


def _first_not_finite(values: torch.Tensor) -> float:
    return values[~values.isfinite()][0].item()


class TextStream:
    """The text of one sample, token by token: whole characters, up to a stop string or the end.

    decode: token ids -> text. stops: the text ends before the first of these that is complete,
    wherever tokens begin and end. end_of_text: the token that ends a sample, itself no text.
    """

    def __init__(
        self,
        decode: Callable[[Iterable[int]], str],
        stops: Sequence[str] = (),
        end_of_text: int | None = None,
    ):
        self.decode, self.stops, self.end_of_text = decode, stops, end_of_text
        self.text = ''  # what is certain
        self.ended = False
        self._pending: list[int] = []  # tokens since the last that ended a character
        self._taken = 0  # characters of theirs that were taken already
        self._held = ''  # which may become part of a stop string

    def add(self, token: int) -> str:
        """What a token makes certain of the text."""
        if self.ended:
            return ''
        if token == self.end_of_text:
            return self.finish()
        self._pending.append(token)
        text = self.decode(self._pending)
        if text.endswith(REPLACEMENT):  # perhaps the first bytes of a character
            return self._take(text[:-1])
        fresh = self._take(text)
        self._pending, self._taken = [], 0
        return fresh

    def finish(self) -> str:
        """End the sample; what was held back of its text."""
        if self.ended:
            return ''
        fresh = self._take(self.decode(self._pending))
        if not self.ended:
            fresh, self.ended = fresh + self._held, True
            self.text += self._held
        return fresh

    def _take(self, text: str) -> str:
        """What is certain now that the pending tokens are known to begin with `text`."""
        held, self._taken = self._held + text[self._taken :], len(text)
        found = [(held.find(stop) + len(stop), held.find(stop)) for stop in self.stops]
        complete = [(end, begin) for end, begin in found if begin >= 0]
        if complete:
            self.ended, certain = True, min(complete)[1]
        else:
            certain = len(held) - max((begun(stop, held) for stop in self.stops), default=0)
        fresh, self._held = held[:certain], held[certain:]
        self.text += fresh
        return fresh


def begun(stop: str, text: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
