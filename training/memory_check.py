"""Memory that does not suffice: told before a run where that is certain, and when it runs out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common import hardware
from common.errors import UserError
from model_builder import Transformer, build_model, count_parameters
from model_config import ModelArchitectureConfig
from parallel.strategies import SingleProcess, recomputed_blocks
from training_config import Settings

BYTES_PER_PARAMETER = 4 * 4  # in fp32: the weight, its gradient, AdamW's two moments


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that a device, or the machine, has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextmanager
def user_friendly_errors(
    settings: Settings, parallel: SingleProcess, device: torch.device
) -> Iterator[None]:
    """Around a run: a want of memory becomes a UserError with what to type, and a rank's failure
    is known to all of them (`SingleProcessGroup.propagate_failures`)."""
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
    """Raise UserError if the device's memory cannot hold the least that is needed on each rank.

    Before anything is allocated: a machine that is short of memory ends processes without a word.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    weights, memory = count * bytes_per_parameter // ranks, hardware.total_memory(device)
    if weights + activations <= memory:
        return
    held = 'weights' if bytes_per_parameter == 4 else 'weights and their gradients'
    each = ' on each rank' if ranks > 1 else ''
    more = f', the inputs of the blocks {activations / 1e9:,.1f} GB' if activations else ''
    raise UserError(
        f'too large for {hardware.device_name(device)} and its {memory / 1e9:,.1f} GB of memory: '
        f'the {count:,} {held} take at least {weights / 1e9:,.1f} GB{each}{more}. Lower n_layer, '
        'n_embd, vocab_size, batch_size or block_size; --plan shows what each of them needs.'
    )


def check_training_size(settings: Settings, parallel: SingleProcess, device: torch.device) -> None:
    """The same for a run: in training each block's input is kept, in two bytes a value or more."""
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
    """What to type instead, with the numbers: half the micro-batch, twice the accumulation."""
    run, architecture = settings.run, settings.architecture
    batch_size, accumulation = run.batch_size, run.gradient_accumulation_steps
    tokens = batch_size * accumulation * architecture.block_size
    outside, per_block = activation_bytes(architecture, batch_size, getattr(torch, run.dtype))
    stream = 4 * batch_size * architecture.block_size * architecture.n_embd

    def kept(recomputed: int) -> int:
        # Of recomputed blocks their inputs, and all of one block while it is recomputed.
        whole = architecture.n_layer - recomputed + bool(recomputed)
        return outside + whole * per_block + recomputed * stream

    needed = kept(len(recomputed_blocks(run.activation_checkpointing, architecture.n_layer)))
    saved = needed - kept(architecture.n_layer)
    parameters = count_parameters(build_model(architecture))['total_params']
    advice = []
    if batch_size % 2 == 0:
        advice.append(
            f'--batch_size={batch_size // 2} --gradient_accumulation_steps={accumulation * 2} '
            f'keeps the {tokens:,} tokens of an update and halves what activations need'
        )
    if saved > 0:
        advice.append(
            f'--activation_checkpointing=full saves about {saved / 1e9:.2f} of the '
            f'{needed / 1e9:.2f} GB of activations, for one more forward pass of the blocks'
        )
    advice.append(f'a --block_size below {architecture.block_size} or a smaller model needs less')
    return UserError(
        f'out of memory on {device_name} with batch_size={batch_size}, '
        f'gradient_accumulation_steps={accumulation}, block_size={architecture.block_size}: the '
        f"{parameters:,} weights, their gradients and AdamW's moments take "
        f'{BYTES_PER_PARAMETER * parameters / 1e9:.2f} GB, activations {needed / 1e9:.2f} GB. '
        f'Ways on: {"; ".join(advice)}.'
    )


def activation_bytes(
    architecture: ModelArchitectureConfig, batch_size: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes that a micro-batch's forward pass keeps for the backward pass: outside the blocks, and
    in each block. Parameters apart; measured with tensors that hold no memory."""
    one, two = (_saved_bytes(architecture.replace(n_layer=n), batch_size, dtype) for n in (1, 2))
    return one - (two - one), two - one


def _saved_bytes(architecture: ModelArchitectureConfig, batch_size: int, dtype: torch.dtype) -> int:
    with FakeTensorMode(), torch.device('cpu'):
        model = Transformer(architecture)
        tokens = torch.zeros((batch_size, architecture.block_size), dtype=torch.long)
        saved = _SavedBytes(model)
        with saved, torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            model(tokens, tokens)
    return saved.bytes


class _SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Adds up the storage of what autograd saves, each storage once, the parameters' apart."""

    def __init__(self, model: torch.nn.Module):
        super().__init__(self._pack, lambda tensor: tensor)
        self.bytes = 0
        self.seen = {p.untyped_storage()._cdata for p in model.parameters()}

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.bytes += storage.nbytes()
        return tensor
