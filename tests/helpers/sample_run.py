"""The record of a run as plain values, for tests of logger, console and trackers."""

import io

# 12 layers of width 768, 12 heads, SwiGLU of 2048, an untied head over 50,304 tokens.
EMBEDDING, ATTENTION, FFN, NORMS = 50304 * 768, 12 * 4 * 768**2, 12 * 3 * 768 * 2048, 25 * 768
BLOCKS = ATTENTION + FFN + 24 * 768
TOTAL = 2 * EMBEDDING + ATTENTION + FFN + NORMS
FULL = {
    'attention_projections': 6 * ATTENTION,
    'attention_scores': 12 * 12 * 768 * 1024,
    'ffn': 6 * FFN,
    'output_head': 6 * EMBEDDING,
}
CAUSAL = {**FULL, 'attention_scores': FULL['attention_scores'] // 2}
TOKENS_PER_ITER = 4096
MAX_ITERS = 100

CONFIG = {
    'arch_preset': 'llama',
    'out_dir': 'out',
    'max_iters': MAX_ITERS,
    'seed': 1,
    'data_seed': 2,
    'tensorboard_log': False,
    'wandb_log': False,
}
ARCHITECTURE = {
    'name': '12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm',
    'hash': '3f9c0a7be21d',
    'choices': {
        'n_layer': 12,
        'normalization': 'rmsnorm',
        'position_encoding': 'rope',
        'rope_theta': 10000.0,
        'use_gqa': False,
        'ffn_type': 'swiglu',
    },
}
METADATA = {
    'seed': 1,
    'data_seed': 2,
    'strategy': 'single',
    'world_size': 1,
    'job': None,
    'git_commit': None,
    'git_clean': None,
    'versions': {'python': '3.12.1', 'torch': '2.13.0', 'numpy': '2.1.0'},
    'command': 'python train.py config/arch_llama.py',
    'threads': 2,
    'deterministic': False,
    'platform': 'Linux',
    'config_files': [{'path': 'config/arch_llama.py', 'sha256': 'a' * 64, 'text': '# θ\n'}],
}
STARTUP_INFO = {
    'model': {
        'total_params': TOTAL,
        'active_params': TOTAL,
        'trainable_params': TOTAL,
        'non_embedding_params': TOTAL - EMBEDDING,
        'components': {
            'token_embedding': EMBEDDING,
            'position_encoding': 0,
            'attention': ATTENTION,
            'ffn': FFN,
            'normalization': NORMS,
            'output_head': EMBEDDING,
        },
        'by_kind': [
            {'kind': '', 'layers': 12, 'params': BLOCKS, 'active_params': BLOCKS},
        ],
    },
    'flops': {
        'per_token': sum(FULL.values()),
        'per_token_causal': sum(CAUSAL.values()),
        'breakdown': FULL,
        'breakdown_causal': CAUSAL,
        'attention_ffn_ratio': 2 / 3,
        'elementwise_per_token': 1234567.0,
        'by_kind': [
            {
                'kind': '',
                'per_token': sum(FULL.values()) - FULL['output_head'],
                'per_token_causal': sum(CAUSAL.values()) - CAUSAL['output_head'],
            },
        ],
        'recomputed_per_token': 0.0,
    },
    'optimizer': {
        'name': 'adamw',
        'options': {'beta1': 0.9, 'beta2': 0.95},
        'learning_rate': 6e-4,
        'schedule': 'cosine',
        'schedule_options': {'warmup_iters': 5, 'lr_decay_iters': 100, 'min_lr': 6e-5},
        'weight_decay': 0.1,
        'grad_clip': 1.0,
        'groups': [
            {
                'name': name,
                'rule': 'fused AdamW',
                'tensors': tensors,
                'params': params,
                'weight_decay': weight_decay,
                'lr_scale': 1.0,
            }
            for name, tensors, params, weight_decay in (
                ('matrices', 84, TOTAL - 2 * EMBEDDING - NORMS, 0.1),
                ('tables', 2, 2 * EMBEDDING, 0.1),
                ('gains and biases', 25, NORMS, 0.0),
            )
        ],
    },
    'hardware': {
        'device': 'cuda:0',
        'device_name': 'NVIDIA A100-SXM4-80GB',
        'world_size': 1,
        'dtype': 'bfloat16',
        'peak_tflops': 312.0,
        'peak_source': 'NVIDIA A100 datasheet, dense bfloat16',
        'threads': 2,
        'expected_tokens_per_sec_at_50_mfu': 182516.2,
        'compile': True,
        'activation_checkpointing': 'none',
    },
    'parallel': {
        'bytes_sent_per_update': 0.0,
        'parameter_bytes': None,
        'gradient_bytes': None,
        'optimizer_bytes': None,
    },
    'data': {
        'dataset': 'shakespeare',
        'path': 'data/shakespeare',
        'tokenizer': 'gpt2',
        'vocab_size': 50257,
        'model_vocab_size': 50304,
        'train_tokens': 301966,
        'val_tokens': 36059,
        'train_documents': None,
        'val_documents': None,
        'train_sha256': 'b' * 64,
        'val_sha256': 'c' * 64,
        'train_bytes_per_token': 3.3,
        'val_bytes_per_token': None,
        'batch_size': 1,
        'gradient_accumulation_steps': 4,
        'block_size': 1024,
        'tokens_per_iter': TOKENS_PER_ITER,
        'windows_per_epoch': None,
        'planned_epochs': MAX_ITERS * TOKENS_PER_ITER / 301966,
        'planned_unique_tokens': 223000,
        'eval_windows': {'train': 20, 'val': 20},
    },
    'derived': {'warmup_iters': '5: 5 % of max_iters'},
}
HEADER = {
    'config': CONFIG,
    'architecture': ARCHITECTURE,
    'metadata': METADATA,
    'startup_info': STARTUP_INFO,
}
NO_PEAK = {
    **STARTUP_INFO,
    'hardware': {
        **STARTUP_INFO['hardware'],
        'peak_tflops': None,
        'peak_source': 'no peak is known for this device; --peak_tflops gives one',
        'expected_tokens_per_sec_at_50_mfu': None,
    },
}


DIAGNOSTICS = {
    'layers': [
        {'layer': 0, 'activation_rms': 1.02, 'gradient_norm': 0.0123, 'max_attention_logit': 4.5},
        {'layer': 1, 'activation_rms': 14.7, 'gradient_norm': None, 'max_attention_logit': 123.4},
    ],
    'update_to_weight': {'matrices': 1.234e-3, 'gains and biases': None},
    'val_loss_by_position': [
        {'from': 0, 'to': 1, 'loss': 10.2},
        {'from': 1, 'to': 2, 'loss': 8.125},
        *({'from': 2**k, 'to': 2 ** (k + 1), 'loss': 7 - k / 2} for k in range(1, 10)),
    ],
}


SAMPLE = {'prompt': 'ROMEO:\n', 'text': 'O <b>night</b> & \x1b[31mday\t!', 'time_ms': 812.0}


def iteration(i, *, loss=3.2145, time_ms=234.0, steps=1, mfu=32.45, peak_gb=15.67, rss_gb=2.5):
    return {
        'iter': i,
        'loss': loss,
        'lr': 1.5e-6,
        'time_ms': time_ms,
        'steps': steps,
        'tokens_per_sec': 3557.0,
        'tokens_seen': (i + 1) * TOKENS_PER_ITER,
        'mfu': {
            'mfu_percent': mfu,
            'mfu_causal_percent': mfu and 0.934 * mfu,
            'hfu_percent': mfu,
            'achieved_tflops': 101.2,
            'hardware_peak_tflops': mfu and 312.0,
            'flops_per_token': STARTUP_INFO['flops']['per_token'],
            'architecture': ARCHITECTURE['name'],
        },
        'memory': {'allocated_gb': 12.34, 'peak_gb': peak_gb, 'reserved_gb': 16, 'rss_gb': rss_gb},
        'gradients': {'norm': 2.3456, 'mean': -1.23e-5, 'std': 3.45e-4},
        'loss_scale': None,
        'readings': {},
    }


def evaluation(n, val_loss=4.2, bits=1.8):
    return {
        'iter': n,
        'train_loss': 4.1,
        'val_loss': val_loss,
        'val_bits_per_byte': bits,
        'lr': 1e-4,
        'time_ms': 5123.0,
    }


def checkpoint(n):
    return {
        'iter': n,
        'val_loss': None,
        'path': f'checkpoints/{n}.pt',
        'time_ms': 812.0,
        'write_ms': 3456.0,
    }


class Utf8Terminal(io.StringIO):
    encoding = 'utf-8'

    def isatty(self):
        return True
