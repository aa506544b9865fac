"""Models of transformers for our architectures, and their tensors under our names."""

from pathlib import Path

import torch
import torch.nn as nn

import interop
from model_config import ModelArchitectureConfig

# The defaults belong to other tokenizers; a padding token would have no gradient.
NO_SPECIAL_TOKENS = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))


def from_fields(fields: dict, device: str = 'cpu'):
    """The model of transformers for these fields, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**fields)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation='eager').eval()


def of(config: ModelArchitectureConfig, device: str = 'cpu'):
    """The model of transformers for one of our architectures."""
    fields = interop.convert_config(config).fields
    return from_fields({**NO_SPECIAL_TOKENS, **fields}, device)


@torch.no_grad()
def randomize(module: nn.Module, std: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.normal_(0.0, std, generator=generator)


def randomized_model(fields: dict):
    """A transformers model of the config, with 40 tokens and all weights randomized."""
    model = from_fields({**NO_SPECIAL_TOKENS, 'vocab_size': 40, **fields})
    randomize(model)
    return model


def saved(model, folder: Path, gradients: bool = False) -> interop.PretrainedCheckpoint:
    """The saved weights of the model, or its gradients in place of weights."""
    state = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.save_pretrained(folder, state_dict=state if gradients else None)
    return interop.open_checkpoint(f'hf:{folder}')


def loaded(folder: Path):
    """The model that AutoModelForCausalLM loads from the folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation='eager').eval()
