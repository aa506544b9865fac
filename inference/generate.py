"""Text from a model, a token at a time."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from model_builder import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    tokens: torch.Tensor,
    max_new_tokens: int,
    *,
    choose: Callable[[torch.Tensor], torch.Tensor],
    cache: bool = True,
) -> Iterator[torch.Tensor]:
    """Continue tokens (B, T), yielding (B,) one at a time.

    choose: picks them from the logits, (B, V) -> (B,), as a `sampling.Sampler` does. The context
    is the last `block_size` tokens.

    cache: each token goes through the model once, as long as the text fits into a context and if no
    component is `uncacheable`. When the oldest tokens are forgotten, everything that was made of
    them changes: positions, and what deeper layers keep of the tokens that saw them. So from there
    on each new token takes the whole context through the model, and the text is the same with and
    without a cache.
    """
    size = model.config.block_size
    context = new = tokens[:, -size:]
    cacheable = cache and not model.uncacheable
    kv_cache = model.empty_cache(min(size, tokens.size(1) + max_new_tokens)) if cacheable else None
    for _ in range(max_new_tokens):
        # Where the context is full, the cache is of no more use: the oldest token is forgotten.
        if kv_cache and kv_cache.length + new.size(1) > size:
            kv_cache = None
        with eager_blocks(model):
            logits = model(new if kv_cache else context, last_only=True, cache=kv_cache)
        chosen = choose(logits[:, -1])
        new = chosen[:, None]
        context = torch.cat((context, new), dim=1)[:, -size:]
        yield chosen


def eager_blocks(model: Transformer) -> AbstractContextManager:
    """Not compiled ones, which would be compiled anew for each length."""
    compiled = any(block._compiled_call_impl for block in model.blocks)
    return torch.compiler.set_stance('force_eager') if compiled else nullcontext()
