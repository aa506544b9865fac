"""Output of generated texts to the terminal, and the speed of generation."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from common.console_output import write_text
from common.progress_bar import ProgressBar
from inference.sampling import TextStream

SEPARATOR = '-' * 80


@dataclass
class GenerationSpeed:
    """Tokens and seconds of the prompts, and of the tokens after the first new one of each text."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0  # of texts that have not ended
    later_tokens: int = 0  # new tokens without the first of each text
    later_seconds: float = 0.0
    since: float = 0.0
    at_prompt: bool = False

    def begin(self, tokens: int) -> None:
        """Start the clock of a batch of prompts with `tokens` tokens in all."""
        self.prompt_tokens += tokens
        self.since, self.at_prompt = time.perf_counter(), True

    def step(self, tokens: int) -> None:
        """Count one new token for each of `tokens` texts."""
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
    drawn: Iterator[torch.Tensor],
    texts: Sequence[TextStream],
    prompt: str,
    speed: GenerationSpeed,
    bar: ProgressBar,
) -> None:
    """Write a batch of texts: a single text token by token, several when all are done.

    Several advance the bar meanwhile. After an interruption the unfinished texts are written.
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
            if not alone:
                bar.advance(len(texts))
            if all(text.ended for text in texts):
                break
    finally:
        for text in texts:
            rest = text.finish()
            shown = rest if alone else f'{SEPARATOR}\n{prompt}{text.text}'
            write_text(shown, literal=True)
