"""Errors for insufficient memory: before a run if that is certain, and when memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from common import hardware
from common.errors import UserError
from model_builder import Transformer, build_model, count_parameters
from parallel.strategies import SingleProcess
from planning.memory import MemoryEstimator, strategy_label
from training_config import Settings


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that a device or the machine is out of memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextmanager
def user_friendly_errors(
    settings: Settings, parallel: SingleProcess, device: torch.device
) -> Iterator[None]:
    """Context of a run: an out-of-memory error becomes a UserError with advice, and a rank's
    failure is propagated to the others (`SingleProcessGroup.propagate_failures`)."""
    with parallel.propagate_failures():
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise out_of_memory_error(settings, hardware.device_name(device)) from error
            raise


def check_size(
    model: Transformer,
    device: torch.device,
    bytes_per_parameter: int = 4,
    ranks: int = 1,
    activations: int = 0,
) -> None:
    """Raise UserError if the minimum memory per rank exceeds the device's memory.

    Called before anything is allocated: a machine that runs out of memory kills processes without
    an error message.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    weights, memory = count * bytes_per_parameter // ranks, hardware.total_memory(device)
    if weights + activations <= memory:
        return
    content = 'weights' if bytes_per_parameter == 4 else 'weights and their gradients'
    each = ' on each rank' if ranks > 1 else ''
    more = f', the inputs of the blocks {activations / 1e9:,.1f} GB' if activations else ''
    raise UserError(
        f'too large for {hardware.device_name(device)} and its {memory / 1e9:,.1f} GB of memory: '
        f'the {count:,} {content} take at least {weights / 1e9:,.1f} GB{each}{more}. Lower '
        'n_layer, n_embd, vocab_size, batch_size or block_size; --plan shows what each of them '
        'needs.'
    )


def check_training_size(settings: Settings, parallel: SingleProcess, device: torch.device) -> None:
    """The same for training, which also keeps the input of each block, 2 bytes or more a value."""
    run, architecture = settings.run, settings.architecture
    tokens = run.batch_size * architecture.block_size
    blocks = 1 if run.eval_only else architecture.n_layer
    check_size(
        build_model(architecture),
        device,
        bytes_per_parameter=4 if run.eval_only else 8,
        ranks=parallel.world_size if run.use_fsdp else 1,
        activations=tokens * 2 * (8 + architecture.n_embd * blocks),  # 8: ids and targets
    )


def out_of_memory_error(settings: Settings, device_name: str) -> UserError:
    """An error with the memory needed, and options that need less."""
    run, architecture, ranks = settings.run, settings.architecture, settings.ranks
    batch_size, accumulation = run.batch_size, run.gradient_accumulation_steps
    tokens = batch_size * accumulation * architecture.block_size
    on_gpu = run.device != 'cpu'
    gpu_memory = hardware.total_memory(torch.device(run.device)) if on_gpu else None
    memory = MemoryEstimator(settings, on_gpu, gpu_memory)
    label = strategy_label(run, ranks)
    strategy = next(each for each in memory.strategies(ranks) if each.label == label)
    state_bytes = memory.state_bytes(strategy)
    activations = memory.activation_bytes(strategy, batch_size, run.activation_checkpointing)
    saved = activations - memory.activation_bytes(strategy, batch_size, 'full')
    parameters = count_parameters(memory.simulation.model)['total_params']
    advice = []
    if batch_size % 2 == 0:
        advice.append(
            f'--batch_size={batch_size // 2} --gradient_accumulation_steps={accumulation * 2} '
            f'keeps {tokens:,} tokens per iteration and halves the memory of activations'
        )
    if saved > 0:
        advice.append(
            f'--activation_checkpointing=full saves about {saved / 1e9:.2f} of the '
            f'{activations / 1e9:.2f} GB of activations, at the cost of a second forward pass'
        )
    advice.append(f'a --block_size below {architecture.block_size} or a smaller model needs less')
    each_rank = ' on each rank' if ranks > 1 else ''
    return UserError(
        f'out of memory on {device_name} with batch_size={batch_size}, '
        f'gradient_accumulation_steps={accumulation}, block_size={architecture.block_size}: the '
        f'{parameters:,} weights, their gradients and the state of {run.optimizer} take '
        f'{state_bytes / 1e9:.2f} GB{each_rank}, activations {activations / 1e9:.2f} GB. '
        f'What helps: {"; ".join(advice)}.'
    )
