"""What `gpu.py` and `tests/gpu/` run on a device: updates of a model, runs of the training loop, a
plain GPT to compare with; and how they measure it."""

import contextlib
import io
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import DeviceType

import train
from common import hardware
from configurator import read_command_line
from model_builder import parameter_groups
from model_components import IGNORED
from model_config import PRESETS
from optim.step import GuardedOptimizer
from parallel.strategies import SingleProcess
from studies.keys import STUDY_KEYS
from training import iteration_log
from training.session import Session
from training_config import Settings, load_settings, schema

BATCHES = 4  # which updates repeat
# A tiny model, whose sequences are long enough for flex attention.
TINY = {'n_layer': 2, 'n_head': 4, 'n_embd': 64, 'block_size': 192, 'vocab_size': 256}
# Sizes with which the presets of mixtures are tiny too.
TINY_EXPERTS = {
    'mixtral': {'num_experts': 4},
    'deepseek': {'num_experts': 4, 'experts_per_token': 2, 'shared_experts': 1},
}
# Layers that differ in heads, window, position encoding and FFN.
MIXED = {
    'arch_preset': 'llama',
    'layer_pattern': 'LG',
    'layer_kinds.L.n_head': 2,
    'layer_kinds.L.sliding_window': 6,
    'layer_kinds.G.position_encoding': 'none',
    'layer_kinds.G.ffn_type': 'moe',
    'layer_kinds.G.num_experts': 4,
}
# The options of every model that is checked: the presets, and layers that differ.
MODELS: dict[str, dict] = {
    **{preset: {'arch_preset': preset, **TINY_EXPERTS.get(preset, {})} for preset in PRESETS},
    'mixed': MIXED,
}
GPT2 = {'arch_preset': 'legacy', 'n_layer': 12, 'n_head': 12, 'n_embd': 768}  # 124M parameters
GPT2 |= {'block_size': 1024, 'vocab_size': 50304}


def settings_of(device: torch.device, **options) -> Settings:
    """Resolved settings, as of a run with these options on the device."""
    values = {'device': device, **options}
    argv = [f'--{key}={value}' for key, value in values.items()]
    settings = load_settings(read_command_line(argv, schema))
    return settings.resolve(device, settings.run.dtype, None)


class Updates:
    """A model and its optimizer on a device, as a run sets them up, and updates on random batches
    that are on the device already.

    options: of a run; by default those of a tiny model.
    """

    def __init__(
        self,
        device: torch.device,
        batch_size: int = 2,
        compiled: bool = False,
        dtype: str = 'bfloat16',
        **options,
    ):
        sizes = {} if 'n_layer' in options else TINY
        settings = settings_of(device, dtype=dtype, compile=compiled, **{**sizes, **options})
        self.device, self.run, self.config = device, settings.run, settings.architecture
        strategy = SingleProcess(self.run, device)
        self.raw_model, self.model = strategy.build(self.config, [], compiled)
        optimizer = strategy.build_optimizer(parameter_groups(self.raw_model), self.run)
        self.optimizer = GuardedOptimizer(optimizer, self.run, device, strategy)
        generator = torch.Generator().manual_seed(0)
        shape = (BATCHES, 2, batch_size, self.config.block_size)
        tokens = torch.randint(0, self.config.vocab_size, shape, generator=generator)
        self.batches = [tuple(batch) for batch in tokens.to(device)]

    def backward(self, number: int = 0) -> torch.Tensor:
        """The mean loss of a batch, on the device; adds its gradient."""
        tokens, targets = self.batches[number % BATCHES]
        with hardware.autocast(self.device, self.run.dtype):
            loss, _, aux = self.model.train()(tokens, targets)
        loss = loss / targets.numel()
        self.optimizer.backward(loss + aux.loss)
        return loss.detach()

    def update(self, number: int = 0, measured: bool = False) -> torch.Tensor:
        """One update of the weights; returns the loss before it, on the device."""
        loss = self.backward(number)
        self.optimizer.step(self.run.learning_rate, loss, measured=measured)
        return loss

    @torch.no_grad()
    def evaluate(self, ignored: int = 0) -> torch.Tensor:
        """The mean loss of a batch whose last `ignored` sequences are filling."""
        tokens, targets = self.batches[0]
        targets = targets.clone()
        targets[len(targets) - ignored :] = IGNORED
        with hardware.autocast(self.device, self.run.dtype):
            loss, count, _ = self.model.eval()(tokens, targets)
        return loss / count

    def losses(self, count: int) -> list[float]:
        """The losses of that many updates."""
        return [self.update(number).item() for number in range(count)]


def start_session(dataset: Path, out_dir: Path, **options) -> Session:
    """A run that `train.py` has set up; nothing is printed."""
    values = {'dataset': dataset, 'out_dir': out_dir, 'log_style': 'line', **options}
    argv = [f'--{key}={value}' for key, value in values.items()]
    with contextlib.redirect_stdout(io.StringIO()):
        settings, source = train.read_settings(read_command_line(argv, schema, extra=STUDY_KEYS))
        return train.start_session(settings, source, argv)


def loop_seconds(session: Session, warm_up: int) -> float:
    """Seconds per iteration of the training loop after `warm_up` iterations, until `max_iters`;
    without evaluations and checkpoints."""
    began = 0.0
    run_iteration, between = train.run_iteration, train.evaluate_and_checkpoint

    def watched(session: Session, *arguments) -> None:
        nonlocal began
        if session.progress.iter == warm_up:
            hardware.synchronize(session.device)
            began = time.perf_counter()
        run_iteration(session, *arguments)

    train.run_iteration = watched
    train.evaluate_and_checkpoint = lambda session, _: iteration_log.flush(session)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            train.training_loop(session)
    finally:
        train.run_iteration, train.evaluate_and_checkpoint = run_iteration, between
        session.batch_reader.close()
    hardware.synchronize(session.device)
    return (time.perf_counter() - began) / (session.progress.iter - warm_up)


# --------------------------------------------------------------------------------------------------
# A plain GPT


class _PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.out, self.qkv = nn.Linear(width, width), nn.Linear(width, 3 * width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size, length, width = x.shape
        heads = self.qkv(self.norms[0](x)).view(size, length, 3, self.heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(size, length, width))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class PlainGPT(nn.Module):
    """GPT-2 written with PyTorch's own layers, as nanoGPT is: the whole logits, and their
    cross-entropy by torch. The same parameters and products as preset `legacy`."""

    def __init__(self, layers: int, heads: int, width: int, length: int, vocabulary: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_PlainBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.size(1)]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def plain_training(model: PlainGPT, tokens: torch.Tensor, compiled: bool) -> Callable[[], None]:
    """An update of the plain GPT as in nanoGPT's loop: autocast, clipping, fused AdamW.

    tokens (2, B, T): inputs and targets.
    """
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{'params': decayed}, {'params': others, 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    called = torch.compile(model, dynamic=False) if compiled else model

    def update() -> None:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            loss = called(*tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


# --------------------------------------------------------------------------------------------------
# Measurements


class Cost(NamedTuple):
    milliseconds: float  # per call
    peak_gb: float  # largest allocation during the calls, above what was allocated before


def cost_of(device: torch.device, function: Callable[[], object], calls: int = 5) -> Cost:
    """Mean time of a call and its memory, after two calls to warm up. The memory is 0 on a CPU."""
    function(), function()
    hardware.synchronize(device)
    before = 0
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    began = time.perf_counter()
    for _ in range(calls):
        function()
    hardware.synchronize(device)
    milliseconds = 1e3 * (time.perf_counter() - began) / calls
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == 'cuda' else 0
    return Cost(milliseconds, peak / hardware.GB)


class Kernels(NamedTuple):
    names: list[str]  # the longest-running first
    launches: int


def kernels_of(device: torch.device, function: Callable[[], object]) -> Kernels:
    """The kernels that a call launches, copies excluded; on a CPU its operations."""
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profile:
        function()
        hardware.synchronize(device)
    kind = DeviceType.CUDA if device.type == 'cuda' else DeviceType.CPU
    events = [
        event
        for event in profile.key_averages()
        if event.device_type == kind
        and not event.is_user_annotation
        and not event.key.startswith(('Memcpy', 'Memset'))
    ]
    on_device = 'self_device_time_total' if device.type == 'cuda' else 'self_cpu_time_total'
    events.sort(key=lambda event: -getattr(event, on_device))
    return Kernels([event.key for event in events], sum(event.count for event in events))


@contextmanager
def recorded_waits(device: torch.device) -> Iterator[list[str]]:
    """The operations inside that wait for the device, as `file.py:line`. Always empty on a CPU."""
    places: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        if device.type == 'cuda':
            torch.cuda.set_sync_debug_mode('warn')
        try:
            yield places
        finally:
            if device.type == 'cuda':
                torch.cuda.set_sync_debug_mode('default')
            places += [
                f'{os.path.basename(warning.filename)}:{warning.lineno}'
                for warning in caught
                if 'synchroniz' in str(warning.message)
            ]


@contextmanager
def fp32_products() -> Iterator[None]:
    """Products of fp32 matrices in fp32, not in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
