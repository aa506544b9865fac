"""Generate tokens with a model, one at a time, with or without a KV cache."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    """Continue tokens (B, T). Yields the new tokens (B,) of one position at a time.

    choose: picks tokens from logits, (B, V) -> (B,), like `sampling.Sampler`. The context is the
    last `block_size` tokens.

    cache: use a KV cache while the text fits into the context, if no component is `uncacheable`.
    Once the oldest token drops out of the context, all positions and the hidden states of deeper
    layers change, so from there on every new token recomputes the whole context. The text is the
    same with and without a cache.
    """
    size = model.config.block_size
    context = new = tokens[:, -size:]
    cacheable = cache and not model.uncacheable
    kv_cache = model.empty_cache(min(size, tokens.size(1) + max_new_tokens)) if cacheable else None
    for _ in range(max_new_tokens):
        # Once the context is full, the oldest token drops out and the cache is invalid.
        if kv_cache and kv_cache.length + new.size(1) > size:
            kv_cache = None
        with eager_blocks(model):
            logits = model(new if kv_cache else context, last_only=True, cache=kv_cache)
        chosen = choose(logits[:, -1])
        new = chosen[:, None]
        context = torch.cat((context, new), dim=1)[:, -size:]
        yield chosen


@contextmanager
def eager_blocks(model: Transformer) -> Iterator[None]:
    """Run compiled blocks eagerly, since they would recompile for each length and each hook.

    Kernels that are compiled by themselves stay compiled: uncompiled, flex attention stores all
    scores.
    """
    calls = [(block, block._compiled_call_impl) for block in model.blocks]
    compiled = [(block, call) for block, call in calls if call is not None]
    try:
        for block, _ in compiled:
            block._compiled_call_impl = None
        yield
    finally:
        for block, call in compiled:
            block._compiled_call_impl = call
