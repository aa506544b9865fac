"""Texts of a model as they appear on the terminal, and how fast they were drawn."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from common.console_output import write_text
from inference.sampling import TextStream

SEPARATOR = '-' * 80


@dataclass
class GenerationSpeed:
    """Tokens and seconds of the prompts, and of what came after the first new token of each."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0  # of texts that had not ended
    later_tokens: int = 0  # of these, those after the first of each
    later_seconds: float = 0.0
    since: float = 0.0
    at_prompt: bool = False

    def begin(self, tokens: int) -> None:
        """A batch of prompts of so many tokens begins."""
        self.prompt_tokens += tokens
        self.since, self.at_prompt = time.perf_counter(), True

    def step(self, tokens: int) -> None:
        """So many texts have got a token."""
        now = time.perf_counter()
        if self.at_prompt:
            self.prompt_seconds += now - self.since
        else:
            self.later_tokens += tokens
            self.later_seconds += now - self.since
        self.new_tokens += tokens
        self.since, self.at_prompt = now, False

    def __str__(self) -> str:
        def rate(tokens: int, seconds: float) -> str:
            return f', {tokens / seconds:,.1f} tokens/s' if tokens and seconds else ''

        return (
            f'prompt: {self.prompt_tokens:,} tokens{rate(self.prompt_tokens, self.prompt_seconds)}'
            f'; new: {self.new_tokens:,} tokens{rate(self.later_tokens, self.later_seconds)}'
        )


def write_texts(
    drawn: Iterator[torch.Tensor], texts: Sequence[TextStream], prompt: str, speed: GenerationSpeed
) -> None:
    """Show a batch of texts, one as its tokens are drawn, several when all are done.

    An interruption leaves what was drawn until then.
    """
    alone = len(texts) == 1
    if alone:
        write_text(f'{SEPARATOR}\n{prompt}', end='', literal=True)
    try:
        for step in drawn:
            tokens = step.tolist()
            speed.step(sum(not text.ended for text in texts))
            for text, token in zip(texts, tokens):
                fresh = text.add(token)
                if alone:
                    write_text(fresh, end='', literal=True)
            if all(text.ended for text in texts):
                break
    finally:
        for text in texts:
            rest = text.finish()
            shown = rest if alone else f'{SEPARATOR}\n{prompt}{text.text}'
            write_text(shown, literal=True)
