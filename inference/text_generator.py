"""Text generation: the options, their command-line arguments, and a generator of samples."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields

import torch

from common import hardware
from common.arguments import Argument, range_problems
from common.errors import UserError
from data.tokenizer import Tokenizer
from inference.generate import generate
from inference.sampling import (
    TEMPERATURE,
    TOP_K,
    Sampler,
    TextStream,
    prompt_tokens,
    sample_generator,
)
from model_builder import Transformer


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How tokens are sampled and where a text ends; `GENERATION_ARGUMENTS` has the limits."""

    max_new_tokens: int = 300
    temperature: float = TEMPERATURE
    top_k: int = TOP_K
    top_p: float = 1.0
    min_p: float = 0.0
    stop: Sequence[str] = ()
    ignore_end_of_text: bool = False
    seed: int = 1337

    @classmethod
    def of(cls, namespace: object) -> 'GenerationOptions':
        """The options among the attributes of `namespace`."""
        return cls(**{field.name: getattr(namespace, field.name) for field in fields(cls)})

    def problems(self) -> list[str]:
        """A sentence for each value outside its limits, beginning with `--name=value`."""
        problems = range_problems(self, GENERATION_ARGUMENTS)
        if '' in self.stop:
            problems.append('--stop is empty: give the text before which a sample ends.')
        return problems


DEFAULTS = GenerationOptions()
GENERATION_ARGUMENTS = {
    'max_new_tokens': Argument(
        f'Maximum number of new tokens per sample (default {DEFAULTS.max_new_tokens})',
        int,
        DEFAULTS.max_new_tokens,
        low=1,
    ),
    'temperature': Argument(
        f'Sampling temperature; 0: always the most likely token (default {DEFAULTS.temperature})',
        float,
        DEFAULTS.temperature,
        low=0,
    ),
    'top_k': Argument(
        f'Number of most likely tokens to draw from; 0: all (default {DEFAULTS.top_k})',
        int,
        DEFAULTS.top_k,
        low=0,
    ),
    'top_p': Argument(
        'Cumulative probability of the most likely tokens to draw from (default 1: all)',
        float,
        DEFAULTS.top_p,
        low=0,
        high=1,
    ),
    'min_p': Argument(
        'Minimum probability of a token, relative to the most likely one (default 0: all)',
        float,
        DEFAULTS.min_p,
        low=0,
        high=1,
    ),
    'stop': Argument(
        'Text before which a sample ends; can be repeated',
        default=[],
        settings={'action': 'append', 'metavar': 'TEXT'},
    ),
    'ignore_end_of_text': Argument(
        'Continue after the token that ends a document',
        default=DEFAULTS.ignore_end_of_text,
        settings={'action': 'store_true'},
    ),
    'seed': Argument(
        f'Seed; sample number i is the same in every batch (default {DEFAULTS.seed})',
        int,
        DEFAULTS.seed,
        low=0,
    ),
}


@dataclass(frozen=True)
class TextGenerator:
    """A model and a tokenizer that continue prompts.

    vocab_size: number of tokens of the tokenizer; the model's may be padded. dtype: of the matrix
    products.
    """

    model: Transformer
    tokenizer: Tokenizer
    vocab_size: int
    dtype: str
    options: GenerationOptions

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def autocast(self) -> AbstractContextManager:
        """Context for the precision of the forward passes, to be entered around the iteration."""
        return hardware.autocast(self.device, self.dtype)

    def start(
        self, prompt: Sequence[int], numbers: Sequence[int]
    ) -> tuple[Iterator[torch.Tensor], list[TextStream]]:
        """Start the samples of these numbers: an iterator over new tokens (B,), and empty texts.

        prompt: token ids, of which the last block_size are the context. The random numbers of a
        sample depend on the seed and its number only.
        """
        options = self.options
        choose = Sampler(
            self.vocab_size,
            options.temperature,
            options.top_k,
            options.top_p,
            options.min_p,
            [sample_generator(options.seed, number) for number in numbers],
        )
        end_of_text = None if options.ignore_end_of_text else self.tokenizer.end_of_text
        texts = [TextStream(self.tokenizer.decode, options.stop, end_of_text) for _ in numbers]
        context = torch.tensor(prompt[-self.model.config.block_size :], device=self.device)
        prompts = context.expand(len(texts), -1)
        return generate(self.model, prompts, options.max_new_tokens, choose=choose), texts

    def generate_text(self, prompt: str) -> str:
        """The continuation of `prompt` in sample number 0. Raises UserError."""
        drawn, (text,) = self.start(prompt_tokens(self.tokenizer, prompt, 'prompt'), [0])
        with self.autocast():
            for token in drawn:
                text.add(token.item())
                if text.ended:
                    break
        text.finish()
        return text.text


def checked_options(**values: object) -> GenerationOptions:
    """Options given in Python. Raises UserError for values outside their limits."""
    options = GenerationOptions(**values)  # type: ignore[arg-type]
    if problems := options.problems():
        raise UserError(*(problem.removeprefix('--') for problem in problems))
    return options
