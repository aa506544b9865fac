"""Models of transformers for our architectures, and their tensors under our names."""

from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F

import interop
from components.base import saved_tensors
from helpers.architectures import gradients, random_tokens
from inference.generate import generate
from interop.tensors import scale_rows
from model_builder import Transformer, build_model
from model_config import ModelArchitectureConfig

LONGEST = 64  # tokens of a compared text

# The defaults belong to other tokenizers; a padding token would have no gradient.
NO_SPECIAL_TOKENS = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))


def attention_of(model_type: str) -> str:
    """The attention of transformers to compare with: 'eager' Falcon adds ALiBi twice."""
    return 'sdpa' if model_type == 'falcon' else 'eager'


def from_fields(fields: dict, device: str = 'cpu'):
    """The model of transformers for these fields, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**fields)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            config, attn_implementation=attention_of(config.model_type)
        ).eval()


def architecture(fields: dict) -> ModelArchitectureConfig:
    """Our architecture for the fields of a config.json, in which nothing is refused."""
    problems: list[str] = []
    options = interop.TRANSFORMERS[fields['model_type']].read(fields, problems)
    assert problems == []
    return ModelArchitectureConfig(**{'arch_preset': 'custom', **options})


def of(config: ModelArchitectureConfig, device: str = 'cpu'):
    """The model of transformers for one of our architectures."""
    fields = interop.convert_config(config).fields
    return from_fields({**NO_SPECIAL_TOKENS, **fields}, device)


def router_biases(module: nn.Module) -> dict[str, torch.Tensor]:
    """The biases by which routers balance their load. Other buffers are constants."""
    return {
        name: buffer
        for name, buffer in module.named_buffers()
        if name.endswith('bias') and buffer.dim() == 1  # GPT-Neo's are masks
    }


@torch.no_grad()
def randomize(module: nn.Module, std: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(0)
    for tensor in (*module.parameters(), *router_biases(module).values()):
        tensor.normal_(0.0, std, generator=generator)


def randomized_model(fields: dict):
    """A transformers model of the config, with 40 tokens and all weights randomized."""
    model = from_fields({**NO_SPECIAL_TOKENS, 'vocab_size': 40, **fields})
    randomize(model)
    return model


def saved(model, folder: Path, gradients: bool = False) -> interop.PretrainedCheckpoint:
    """The saved weights of the model, or its gradients in place of weights."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = dict(model.named_parameters()) | {name: p.grad for name, p in trained.items()}
    state |= router_biases(model)
    model.save_pretrained(folder, state_dict=state if gradients else None)
    return interop.open_checkpoint(f'hf:{folder}')


def loaded(folder: Path):
    """The model that AutoModelForCausalLM loads from the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    attention = attention_of(AutoConfig.from_pretrained(folder).model_type)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()


class Parity(NamedTuple):
    """A model of transformers, its import, and what both compute for the same tokens.

    pairs: our tensors and theirs by name; `exported`: those of our export, and ours.
    """

    theirs: nn.Module
    ours: Transformer
    tokens: torch.Tensor
    pairs: dict[str, tuple[dict, dict]]


def compared(fields: dict, folder: Path, exported_as: str | None = None) -> Parity:
    """Import a model with these fields; export it, and read and load the export again.

    exported_as: the model_type of the export; None: that of the fields, even if a family before it
    can express the model too.
    """
    theirs = randomized_model(fields)
    source = saved(theirs, folder / 'theirs')
    config = source.config
    ours = build_model(config, 'cpu')
    weights = dict(source.weights(config))
    assert weights.keys() == saved_tensors(ours).keys()
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert (not missing or config.weight_tying, unexpected) == (True, [])

    tokens = random_tokens(config, batch=3)[:, :LONGEST]
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)  # the last token has no successor
    their_logits = theirs(tokens).logits
    F.cross_entropy(their_logits.flatten(0, 1), targets.flatten()).backward()
    loss_sum, count, _ = ours(tokens, targets)
    (loss_sum / count).backward()
    our_gradients = gradients(ours)
    as_weights = dict(saved(theirs, folder / 'gradients', True).weights(config))
    constants = {
        name: interop.tensor_map_of(source.family, name, config)[0].offset for name in our_gradients
    }
    # Ours = factor · theirs: the import multiplies by it where a gradient is divided by it.
    their_gradients = {
        name: scale_rows(
            as_weights[name] - constants[name], 1 / torch.as_tensor(source.row_factors(name)) ** 2
        )
        for name in our_gradients
    }

    own = {source.family.name: source.family}
    known = interop.TRANSFORMERS if exported_as else own
    with mock.patch.object(interop.exporter, 'TRANSFORMERS', known):
        interop.export(config, saved_tensors(ours), folder / 'ours')
    again = interop.open_checkpoint(f'hf:{folder / "ours"}')
    assert again.config.to_dict() == config.to_dict()
    read_again = dict(again.weights(config))
    assert all(torch.equal(read_again[name], weights[name]) for name in weights)
    exported = loaded(folder / 'ours')
    assert exported.config.model_type == (exported_as or theirs.config.model_type)
    with torch.no_grad():
        our_logits, exported_logits = ours.eval()(tokens), exported(tokens).logits
    pairs = {
        'logits': ({'': our_logits}, {'': their_logits}),
        'gradients': (our_gradients, their_gradients),
        'exported': ({'': exported_logits}, {'': our_logits}),
    }
    return Parity(theirs, ours, tokens, pairs)


def largest_difference(ours: dict, theirs: dict) -> float:
    """The largest difference of two tensors of a name, relative to the largest value in theirs."""
    assert ours.keys() == theirs.keys()
    return max(((ours[k] - theirs[k]).abs().max() / theirs[k].abs().max()).item() for k in ours)


# The largest differences that the tests allow.
BOUNDS = {'logits': 1e-5, 'gradients': 1e-4, 'exported': 1e-5}


def continuations(parity: Parity, new_tokens: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The most likely tokens after the first 5, (B, new_tokens): theirs, and ours with and without
    a cache."""
    prompt = parity.tokens[:, :5]
    expected = parity.theirs.generate(prompt, max_new_tokens=new_tokens, do_sample=False)
    assert expected.shape == (len(prompt), 5 + new_tokens)
    texts = [
        generate(parity.ours, prompt, new_tokens, choose=lambda x: x.argmax(-1), cache=cache)
        for cache in (True, False)
    ]
    return expected[:, 5:], [torch.stack(list(text), dim=1) for text in texts]


def assert_parity(
    fields: dict, letters: str, folder: Path, new_tokens: int = 11, exported_as: str | None = None
) -> None:
    """Assert that a model of transformers with these fields is imported and exported exactly.

    letters: the letter of each layer that it is read as; '' if they are all alike. exported_as: the
    model_type of the export, if it is that of another family. Compared are
    logits, gradients, logits of the export, and the most likely continuation of 5 tokens, with and
    without a cache.
    """
    parity = compared(fields, folder, exported_as)
    assert ''.join(parity.ours.config.layer_letters) == letters
    for kind, bound in BOUNDS.items():
        assert largest_difference(*parity.pairs[kind]) < bound, kind
    expected, texts = continuations(parity, new_tokens)
    assert all(torch.equal(text, expected) for text in texts)
