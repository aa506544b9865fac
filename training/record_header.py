"""The header of a run's record: every option, the architecture, and the start-up information."""

import hashlib
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from common import hardware
from common.architecture_identity import HASH_VERSION
from common.environment import job
from common.files import file_sha256
from common.gpu_specs import Peak
from common.published_designs import FAMILY
from common.registry import Configurable
from configurator import flatten
from data.dataset import TokenDataset
from model_builder import Transformer, count_parameters
from model_config import PRESETS, ModelArchitectureConfig
from parallel.strategies import SingleProcess
from records.record_types import (
    DataInfo,
    FlopsInfo,
    HardwareInfo,
    LayerChoices,
    OptimizerInfo,
    RecordHeader,
    RunMetadata,
    WeightsSource,
)
from training.resume import UNCHOSEN_ORIGINS
from training.session import RunContext
from training_config import (
    OPTIMIZER_REGISTRY,
    SCHEDULE_REGISTRY,
    Settings,
    TrainingConfig,
    schema,
)

PROJECT = Path(__file__).absolute().parents[1]
# Packages and modules that affect no loss: display, storage, planning, error messages.
DISPLAY_ONLY = (
    *('comparison/', 'inference/', 'planning/', 'records/', 'studies/'),
    *('training_logger.py', 'training/record_header.py'),
    *('common/console_output.py', 'common/errors.py', 'common/formatting.py'),
    *('common/live_region.py', 'common/progress_bar.py', 'common/text_width.py'),
)


def record_header(
    context: RunContext,
    *,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    flops: FlopsInfo,
    peak: Peak,
    compiled: bool,
    weights_from: WeightsSource | None,
) -> RecordHeader:
    """`config`, `architecture`, `metadata` and `startup_info` of the record.

    flops: FLOPs per token. peak: peak of one device. weights_from: source of the initial weights.
    """
    settings, parallel = context.settings, context.parallel
    run, architecture = settings.run, settings.architecture
    return {
        'config': settings.to_dict(),
        'architecture': {
            'name': architecture.name,
            'hash': architecture.hash,
            'hash_version': HASH_VERSION,
            'choices': architecture.to_dict(),
            'layers': layer_choices(architecture),
        },
        'metadata': _metadata(context, weights_from),
        'startup_info': {
            'model': count_parameters(model),
            'flops': flops,
            'optimizer': _optimizer(settings, optimizer),
            'hardware': _hardware(context, peak, flops, compiled),
            'parallel': {
                'bytes_sent_per_update': bytes_sent_per_update(run, model, optimizer, parallel),
                # Known after the first iteration (`Session.record_memory_footprint`).
                'parameter_bytes': None,
                'gradient_bytes': None,
                'optimizer_bytes': None,
            },
            'data': _data(settings, context.dataset),
            'derived': settings.derived,
            'chosen': chosen_options(settings),
        },
    }


def layer_choices(architecture: ModelArchitectureConfig) -> LayerChoices | None:
    """The resolved options of each kind of layers; None if all layers have the model's own."""
    if architecture.is_uniform and architecture.get('layer_pattern') is None:
        return None
    return {
        'letters': list(architecture.layer_letters),
        'kinds': {letter: kind.to_dict() for letter, kind in architecture.kinds.items()},
    }


def chosen_options(settings: Settings) -> dict[str, str]:
    """Options that differ from the defaults and the preset, and where each was set."""
    origins = {**settings.run.origins, **settings.architecture.origins}
    usual = {key: option.default for key, option in flatten(schema()).items()}
    usual |= PRESETS.get(settings.architecture.preset, {})
    return {
        key: origins[key]
        for key, value in settings.to_dict().items()
        if not origins.get(key, 'default').startswith((*UNCHOSEN_ORIGINS, 'preset', FAMILY))
        and value != usual.get(key)
    }


def run_environment(header: RecordHeader) -> dict[str, Any]:
    """Everything besides the options that can change a run's results, down to the last bits."""
    metadata, info = header['metadata'], header['startup_info']
    return {
        'threads': metadata['threads'],
        'world_size': metadata['world_size'],
        'strategy': metadata['strategy'],
        'git_commit': metadata['git_commit'],
        'device_name': info['hardware']['device_name'],
        **{f'version of {name}': version for name, version in metadata['versions'].items()},
        'train_sha256': info['data']['train_sha256'],
        'val_sha256': info['data']['val_sha256'],
    }


def bytes_sent_per_update(
    run: TrainingConfig,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    parallel: SingleProcess,
) -> float:
    """Bytes that a rank sends per iteration, for the strategy and the optimizer."""
    micro_steps = run.gradient_accumulation_steps // parallel.world_size
    return optimizer.bytes_sent + parallel.bytes_sent(model, micro_steps)


def source_hashes() -> dict[str, str]:
    """The first digits of the SHA-256 of each source file that training depends on.

    These are the imported modules of the project, without those in `DISPLAY_ONLY`. Config files
    are recorded in `config_files`.
    """
    root = PROJECT.resolve()
    # Both the path as imported and the resolved one: resolving every module's path is slow.
    beginnings = tuple({f'{folder}{os.sep}' for folder in (PROJECT, PROJECT.resolve())})
    imported = [getattr(module, '__file__', None) for module in [*sys.modules.values()]]
    files = {os.path.abspath(file) for file in imported if file}
    paths = {Path(file).resolve() for file in files if file.startswith(beginnings)}
    ours = {path.relative_to(root).as_posix(): path for path in paths if root in path.parents}
    return {
        name: file_sha256(path)[:16]
        for name, path in sorted(ours.items())
        if path.suffix == '.py'
        and not name.startswith(DISPLAY_ONLY)
        and not {'site-packages', 'tests', 'benchmarks'} & set(path.parts)
        and path.exists()
    }


def _metadata(context: RunContext, weights_from: WeightsSource | None) -> RunMetadata:
    run, parallel = context.settings.run, context.parallel
    commit, clean = hardware.git_state(PROJECT)
    return {
        'seed': run.seed,
        'data_seed': run.data_seed,
        'strategy': parallel.name,
        'world_size': parallel.world_size,
        'job': job(),
        'git_commit': commit,
        'git_clean': clean,
        'versions': hardware.versions(),
        'code': source_hashes(),
        'command': shlex.join(['python', 'train.py', *context.argv]),
        'weights_from': weights_from,
        'threads': torch.get_num_threads(),
        'deterministic': run.deterministic,
        'platform': platform.platform(),
        'config_files': [
            {
                'path': file['path'],
                'text': file['text'],
                'sha256': hashlib.sha256(file['text'].encode()).hexdigest(),
            }
            for file in context.settings.command_line.config_files
        ],
    }


def _hardware(context: RunContext, peak: Peak, flops: FlopsInfo, compiled: bool) -> HardwareInfo:
    run, world_size = context.settings.run, context.parallel.world_size
    total_peak = peak.tflops and peak.tflops * world_size
    return {
        'device': str(context.device),
        'device_name': hardware.device_name(context.device),
        'world_size': world_size,
        'dtype': run.dtype,
        'peak_tflops': total_peak,
        'peak_source': peak.source,
        'threads': torch.get_num_threads(),
        'expected_tokens_per_sec_at_50_mfu': total_peak
        and 0.5 * total_peak * 1e12 / flops['per_token'],
        'compile': compiled,
        'activation_checkpointing': run.activation_checkpointing,
    }


def _optimizer(settings: Settings, optimizer: torch.optim.Optimizer) -> OptimizerInfo:
    run = settings.run
    schedule = SCHEDULE_REGISTRY[run.lr_schedule] if run.decay_lr else None

    def options(component: type[Configurable] | None) -> dict:
        keys = component.options if component else ()
        return {key: getattr(run, key) for key in keys if key in run}

    return {
        'name': run.optimizer,
        'options': options(OPTIMIZER_REGISTRY[run.optimizer]),
        'learning_rate': run.learning_rate,
        'schedule': run.lr_schedule if schedule else 'none',
        'schedule_options': options(schedule),
        'weight_decay': run.weight_decay,
        'grad_clip': run.grad_clip,
        'groups': [
            {
                'tensors': len(group['params']),
                'params': sum(parameter.numel() for parameter in group['params']),
                'name': group['name'],
                'rule': group['rule'],
                'weight_decay': group['weight_decay'],
                'lr_scale': group['lr_scale'],
            }
            for group in optimizer.param_groups
        ],
    }


def _data(settings: Settings, dataset: TokenDataset) -> DataInfo:
    run, block_size = settings.run, settings.architecture.block_size
    order = dataset.order(run.sampling, run.data_seed)
    per_iter = run.batch_size * run.gradient_accumulation_steps
    sequences = run.max_iters * per_iter
    return {
        'dataset': run.dataset,
        'path': str(dataset.folder),
        'tokenizer': dataset.tokenizer['kind'] if dataset.tokenizer else None,
        'vocab_size': dataset.vocab_size,
        'model_vocab_size': settings.architecture.vocab_size,
        'train_tokens': dataset.tokens('train'),
        'val_tokens': dataset.tokens('val'),
        'train_documents': dataset.documents('train'),
        'val_documents': dataset.documents('val'),
        'train_sha256': dataset.sha256('train'),
        'val_sha256': dataset.sha256('val'),
        'train_bytes_per_token': dataset.bytes_per_token('train'),
        'val_bytes_per_token': dataset.bytes_per_token('val'),
        'batch_size': run.batch_size,
        'gradient_accumulation_steps': run.gradient_accumulation_steps,
        'block_size': block_size,
        'tokens_per_iter': per_iter * block_size,
        'windows_per_epoch': order.windows_per_epoch,
        'planned_epochs': sequences * block_size / order.tokens_per_epoch,
        'planned_unique_tokens': order.unique_tokens(sequences),
        'eval_windows': {
            'train': dataset.window_count('train', run.eval_iters),
            'val': dataset.window_count('val', run.eval_iters),
        },
    }
