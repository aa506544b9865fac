"""Import from and export to transformers and nanoGPT give equal logits and gradients."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import transformers_models as reference
from helpers.architectures import perturbed_model, random_tokens, tiny
from helpers.in_process import joined, train_here
from helpers.project import PROJECT
from safetensors.torch import load_file

import interop
from common.errors import UserError
from model_builder import build_model
from model_config import ModelArchitectureConfig
from records.record import read_record
from records.run_folders import latest_run

pytestmark = [pytest.mark.optional, pytest.mark.slow, pytest.mark.usefixtures('one_thread')]

# --- Parity with transformers ---------------------------------------------------------------------

GPT2_SIZES = {'n_layer': 2, 'n_head': 4, 'n_embd': 32}
GPT2 = {
    'model_type': 'gpt2',
    **GPT2_SIZES,
    'n_positions': 16,
}
SIZES = {
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'hidden_size': 32,
    'intermediate_size': 48,
    'max_position_embeddings': 16,
}
GROUPED = {'num_key_value_heads': 2}


def rotary(theta=50.0, **scaling) -> dict:
    """The rope fields of a transformers 5 config."""
    return {'rope_parameters': {'rope_theta': theta, 'rope_type': 'default', **scaling}}


LLAMA3 = rotary(
    rope_type='llama3',
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = rotary(rope_type='yarn', factor=4.0, original_max_position_embeddings=32)

OPT = {
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'hidden_size': 32,
    'ffn_dim': 48,
    'max_position_embeddings': 16,
}

DEEPSEEK = {
    **SIZES,
    'q_lora_rank': 12,
    'kv_lora_rank': 10,
    'qk_nope_head_dim': 6,
    'qk_rope_head_dim': 4,
    'v_head_dim': 5,
    'n_routed_experts': 4,
    'moe_intermediate_size': 16,
    'n_shared_experts': 2,
}

# Configs of transformers; missing fields have the defaults of transformers.
CONFIGS = {
    'gpt2': GPT2,
    'gpt2-untied': {
        **GPT2,
        'tie_word_embeddings': False,
        'activation_function': 'relu',
        'n_inner': 40,
        'layer_norm_epsilon': 0.1,
    },
    'llama': {'model_type': 'llama', **SIZES},
    'llama-grouped-tied': {
        'model_type': 'llama',
        **SIZES,
        **GROUPED,
        **rotary(),
        'tie_word_embeddings': True,
        'rms_norm_eps': 0.1,
    },
    'llama3': {'model_type': 'llama', **SIZES, **GROUPED, **LLAMA3},
    'llama-yarn': {'model_type': 'llama', **SIZES, **YARN},
    'llama-linear': {'model_type': 'llama', **SIZES, **rotary(rope_type='linear', factor=3.0)},
    'llama-biases': {
        'model_type': 'llama',
        **SIZES,
        'attention_bias': True,
        'mlp_bias': True,
        'head_dim': 12,
    },
    'qwen3': {'model_type': 'qwen3', **SIZES, **GROUPED, 'head_dim': 12},
    'qwen3-windows': {
        'model_type': 'qwen3',
        **SIZES,
        'num_hidden_layers': 3,
        'num_key_value_heads': 4,
        'use_sliding_window': True,
        'sliding_window': 5,
        'max_window_layers': 1,
    },
    'gemma2': {
        'model_type': 'gemma2',
        **SIZES,
        **GROUPED,
        'head_dim': 12,
        'query_pre_attn_scalar': 20,
        'sliding_window': 5,
        'attn_logit_softcapping': 2.0,
        'final_logit_softcapping': 3.0,
    },
    'olmo2': {'model_type': 'olmo2', **SIZES, **GROUPED},
    'mistral': {'model_type': 'mistral', **SIZES, **GROUPED, 'sliding_window': 5},
    'gpt_neox': {'model_type': 'gpt_neox', **SIZES},
    'gpt_neox-sequential': {
        'model_type': 'gpt_neox',
        **SIZES,
        'use_parallel_residual': False,
        'attention_bias': False,
        'hidden_act': 'gelu_fast',
        'rotary_pct': 0.5,
        'rotary_emb_base': 50.0,
    },
    'opt': {'model_type': 'opt', **OPT, 'enable_bias': False},
    'opt-post': {
        'model_type': 'opt',
        **OPT,
        'do_layer_norm_before': False,
        'activation_function': 'gelu',
        'tie_word_embeddings': False,
    },
    'mixtral': {
        'model_type': 'mixtral',
        **SIZES,
        **GROUPED,
        'num_local_experts': 4,
        'num_experts_per_tok': 2,
    },
    'deepseek_v2': {
        'model_type': 'deepseek_v2',
        **DEEPSEEK,
        'first_k_dense_replace': 1,
        'num_experts_per_tok': 2,
        'routed_scaling_factor': 1.5,
    },
    'deepseek_v2-groups': {
        'model_type': 'deepseek_v2',
        **DEEPSEEK,
        'num_experts_per_tok': 3,
        'n_routed_experts': 8,
        'topk_method': 'group_limited_greedy',
        'n_group': 4,
        'topk_group': 2,
    },
    'deepseek_v2-yarn': {
        'model_type': 'deepseek_v2',
        **DEEPSEEK,
        'q_lora_rank': None,
        'num_experts_per_tok': 1,
        'attention_bias': True,
        **rotary(
            rope_type='yarn',
            factor=40.0,
            mscale=0.7,
            mscale_all_dim=0.9,
            beta_fast=16,
            original_max_position_embeddings=32,
        ),
    },
    'deepseek_v3': {
        'model_type': 'deepseek_v3',
        **DEEPSEEK,
        'num_key_value_heads': 4,
        'n_routed_experts': 8,
        'n_group': 4,
        'topk_group': 2,
        'first_k_dense_replace': 1,
        'num_experts_per_tok': 3,
    },
}


def largest(ours: dict, theirs: dict) -> float:
    """The largest difference between two tensors of a name, relative to the norm of `theirs`."""
    assert ours.keys() == theirs.keys()
    return max(
        (torch.linalg.norm(ours[name] - theirs[name]) / torch.linalg.norm(theirs[name])).item()
        for name in ours
    )


@pytest.mark.parametrize('name', CONFIGS)
def test_parity_with_transformers(name, tmp_path):
    pairs = reference.compared(CONFIGS[name], tmp_path).pairs
    differences = {compared: largest(*pair) for compared, pair in pairs.items()}
    assert max(differences.values()) < 1e-5, differences


# --- Folders of every kind ------------------------------------------------------------------------


def imported(source: interop.PretrainedCheckpoint):
    """The project's model with the weights of the source."""
    model = build_model(source.config, 'cpu')
    model.load_state_dict(dict(source.weights(source.config)), strict=False)
    return model


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
    """A Llama of transformers and the folder that it was saved in."""
    folder = tmp_path_factory.mktemp('llama')
    model = reference.randomized_model(CONFIGS['llama-grouped-tied'])
    reference.saved(model, folder)
    return model, folder


def rewritten(folder: Path, to: Path, change) -> interop.PretrainedCheckpoint:
    """The checkpoint of a copy, a pytorch_model.bin, after `change(fields, tensors)`."""
    fields = json.loads((folder / 'config.json').read_text())
    tensors = load_file(folder / 'model.safetensors')
    change(fields, tensors)
    (to / 'config.json').write_text(json.dumps(fields))
    torch.save(tensors, to / 'pytorch_model.bin')
    return interop.open_checkpoint(f'hf:{to}')


def assert_same_logits(source: interop.PretrainedCheckpoint, theirs) -> None:
    tokens = random_tokens(source.config, batch=2)
    torch.testing.assert_close(
        imported(source)(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5
    )


def test_sharded_safetensors(llama, tmp_path):
    model, _ = llama
    model.save_pretrained(tmp_path, max_shard_size='8KB')
    assert len(list(tmp_path.glob('model-*.safetensors'))) > 1
    assert_same_logits(interop.open_checkpoint(f'hf:{tmp_path}'), model)


def test_transformers_4_config_and_unprefixed_pickle(llama, tmp_path):
    model, folder = llama

    def change(fields, tensors):
        rope = fields.pop('rope_parameters')
        fields.update(rope_theta=rope['rope_theta'], rope_scaling=None, torch_dtype='float32')
        del fields['head_dim'], fields['attention_bias']
        for name in list(tensors):
            tensors[name.removeprefix('model.')] = tensors.pop(name)
        tensors['layers.0.self_attn.rotary_emb.inv_freq'] = torch.ones(4)
        tensors['lm_head.weight'] = tensors['embed_tokens.weight']

    assert_same_logits(rewritten(folder, tmp_path, change), model)


def test_index_cannot_name_files_outside_its_folder(llama, tmp_path):
    _, folder = llama
    outside, inside = tmp_path / 'outside.safetensors', tmp_path / 'inside'
    inside.mkdir()
    outside.write_bytes((folder / 'model.safetensors').read_bytes())
    (inside / 'config.json').write_text((folder / 'config.json').read_text())
    index = {'weight_map': {'model.norm.weight': '../outside.safetensors'}}
    (inside / 'model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(UserError, match=r'inside/outside\.safetensors cannot be read'):
        interop.open_checkpoint(f'hf:{inside}')


def test_pickled_code_is_not_run(llama, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / 'trapped',))

    (tmp_path / 'config.json').write_text((llama[1] / 'config.json').read_text())
    torch.save({'model.norm.weight': Trap()}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(UserError, match='No code in it was run'):
        interop.open_checkpoint(f'hf:{tmp_path}')
    assert not (tmp_path / 'trapped').exists()


def without(name):
    return lambda fields, tensors: tensors.pop(name)


def with_field(**changed):
    return lambda fields, tensors: fields.update(changed)


def resized(fields, tensors):
    tensors['model.norm.weight'] = torch.ones(31)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (with_field(model_type='lama'), "model_type='lama' is not supported.* Did you mean llama"),
        (with_field(hidden_act='relu'), "hidden_act='relu' is not supported; supported: 'silu'"),
        (with_field(hidden_size=None), 'hidden_size=None: must be a whole number'),
        (with_field(quantization_config={'bits': 4}), 'quantization_config'),
        (with_field(rope_parameters={'rope_type': 'dynamic'}), "rope_type='dynamic'"),
        (
            with_field(rope_parameters={'rope_type': 'linear', 'factor': 2.0, 'truncate': False}),
            'rope_parameters: truncate=False: not supported',
        ),
        (with_field(rope_parameters={'rope_type': 'linear'}), 'factor is missing'),
        (without('model.norm.weight'), "has no tensor 'model.norm.weight'"),
        (
            lambda fields, tensors: tensors.update(extra=torch.ones(2)),
            "has a tensor 'extra' that is not part of LlamaForCausalLM",
        ),
        (with_field(num_hidden_layers=1), "has a tensor 'model.layers.1.*not part of"),
        (resized, r'model.norm.weight has shape \(31,\), but its config requires \(32,\)'),
    ],
)
def test_inexpressible_checkpoints_are_refused(llama, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        imported(rewritten(llama[1], tmp_path, change))


def test_missing_package_is_named(llama, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'safetensors', None)
    with pytest.raises(UserError, match='pip install safetensors'):
        interop.open_checkpoint(f'hf:{llama[1]}')


# Values in place of defaults that are not legal.
LEGAL_SIZES = {
    'recurrent_gemma': {  # whose root is rounded in bfloat16
        'hidden_size': 4096,
        'num_attention_heads': 16,
        'head_dim': 256,
        'num_key_value_heads': 16,
        'lru_width': 4096,
    },
    'lfm2_moe': {'layer_types': ['conv'] * 32},  # not optional
    'glm4_moe': {'num_attention_heads': 32},
    'dots1': {'n_routed_experts': 8, 'n_shared_experts': 1},
    'granitemoehybrid': {'intermediate_size': 512},
    'dbrx': {'ffn_config': {'moe_top_k': 2}},
}


@pytest.mark.parametrize('family', interop.TRANSFORMERS)
def test_missing_fields_have_transformers_defaults(family):
    """A config with all defaults written out equals one with the required fields only."""
    from transformers import AutoConfig

    table = interop.TRANSFORMERS[family]
    full = AutoConfig.for_model(family).to_dict()
    # Values in place of DeepSeek's defaults that are None or refused.
    legal = {'num_experts_per_tok': 2, 'n_group': 1, 'topk_group': 1, 'moe_intermediate_size': 64}
    legal |= {'moe_shared_expert_intermediate_size': 64}
    full |= {key: value for key, value in legal.items() if key in full}
    full |= LEGAL_SIZES.get(family, {})
    needed = ('n_layer', 'n_head', 'n_embd', 'vocab_size', 'num_hidden_layers', 'hidden_size')
    needed += ('n_layers', 'n_heads', 'd_model')  # MPT's names
    needed += ('num_attention_heads', 'intermediate_size', *legal)
    needed += tuple(LEGAL_SIZES.get(family, ()))
    needed += ('layers_block_type',) if family == 'nemotron_h' else ()  # gives the number of layers
    short = {key: full[key] for key in needed if key in full}
    problems = []
    resolved = [
        ModelArchitectureConfig(**{'arch_preset': 'custom', **table.read(fields, problems)})
        for fields in (short, full)
    ]
    assert resolved[0].to_dict() == resolved[1].to_dict()
    assert problems == []


FAMILY_OF_PRESET = {
    'llama': 'llama',
    'llama3': 'llama',
    'mistral': 'mistral',
    'qwen3': 'qwen3',
    'olmo2': 'olmo2',
    'olmo3': 'olmo3',
    'smollm3': 'smollm3',
    'granite': 'granite',
    'cohere2': 'cohere2',
    'gemma2': 'gemma2',
    'gemma3': 'gemma3_text',
    'pythia': 'gpt_neox',
    'mixtral': 'mixtral',
    'deepseek': 'deepseek_v2',
    'qwen3_moe': 'qwen3_moe',
    'glm4_moe': 'glm4_moe',
    'deepseek_v3': 'deepseek_v3',
    'gpt_oss': 'gpt_oss',
    'llama4': 'llama4_text',
    'lfm2': 'lfm2',
    'mamba': 'mamba',
    'jamba': 'jamba',
    'qwen3_next': 'qwen3_next',
    'kimi_linear': 'kimi_linear',
}


@pytest.mark.parametrize('preset', FAMILY_OF_PRESET)
def test_presets_export_as_the_family_of_their_name(preset):
    for values in ({}, {'n_layer': 4, 'n_head': 6, 'n_embd': 48}):
        config = ModelArchitectureConfig(arch_preset=preset, vocab_size=40, **values)
        family, _, converted = interop.convert_config(config)
        assert converted is config
        assert family.name == FAMILY_OF_PRESET[preset]
        theirs = reference.of(config, device='meta')
        ours = build_model(config)
        assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()


WITHOUT_BIASES = {
    'gpt2': ('gpt2', {}, 'OPTForCausalLM'),
    'hybrid': ('hybrid', {}, 'GPTNeoXForCausalLM'),
    'nanogpt': ('legacy', {'bias': False}, 'GPT2LMHeadModel'),
}


@pytest.mark.parametrize('name', WITHOUT_BIASES)
def test_missing_biases_are_exported_as_zeros(name, tmp_path):
    """Reading the export again gives the same logits."""
    preset, values, architecture = WITHOUT_BIASES[name]
    config = tiny(arch_preset=preset, **values)
    ours = perturbed_model(config)
    interop.export(config, dict(ours.named_parameters()), tmp_path / 'theirs')
    theirs = reference.loaded(tmp_path / 'theirs')
    assert type(theirs).__name__ == architecture
    tokens = random_tokens(config, batch=2)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), rtol=1e-5, atol=1e-5)
    again = interop.open_checkpoint(f'hf:{tmp_path / "theirs"}')
    assert again.config.normalization == 'layernorm'
    assert_same_logits(again, theirs)


def test_missing_selection_bias_is_exported_as_zeros(tmp_path):
    config = tiny(arch_preset='deepseek', router_score='sigmoid', router_normalize=True)
    ours = perturbed_model(config)
    interop.export(config, dict(ours.named_parameters()), tmp_path / 'theirs')
    theirs = reference.loaded(tmp_path / 'theirs')
    assert type(theirs).__name__ == 'DeepseekV3ForCausalLM'
    assert not theirs.model.layers[1].mlp.gate.e_score_correction_bias.any()
    again = interop.open_checkpoint(f'hf:{tmp_path / "theirs"}')
    assert again.config.router_selection_bias
    assert_same_logits(again, theirs)


# --- Other vocabulary and block sizes -------------------------------------------------------------


def test_vocabulary_and_positions_are_resized(tmp_path):
    theirs = reference.randomized_model(CONFIGS['gpt2'])
    source = reference.saved(theirs, tmp_path)
    tokens = random_tokens(source.config, batch=2)[:, :8]
    expected = theirs(tokens).logits
    for vocab_size in (64, 40, 33):
        config = source.config.replace(vocab_size=vocab_size, block_size=8)
        model = build_model(config, 'cpu')
        model.load_state_dict(dict(source.weights(config)), strict=False)
        shared = min(vocab_size, 40)
        known = tokens.clamp(max=shared - 1)
        expected = theirs(known).logits
        logits = model(known)
        torch.testing.assert_close(logits[..., :shared], expected[..., :shared])
        # The added tokens are no likelier than the others on average.
        normaliser = logits.logsumexp(-1) - logits[..., :shared].logsumexp(-1)
        assert (normaliser <= torch.tensor(max(vocab_size / 40, 1)).log() + 1e-6).all()


# --- nanoGPT --------------------------------------------------------------------------------------


@pytest.fixture
def nanogpt_checkpoint(tmp_path):
    """nanogpt_checkpoint(bias): a ckpt.pt in nanoGPT's format and the model that it contains.

    nanoGPT has the module names of transformers and transposed matrices. Without `bias` its norms
    have no bias either.
    """

    def write(bias: bool):
        theirs = reference.randomized_model({**GPT2, 'activation_function': 'gelu'})
        state = {}
        for name, tensor in theirs.state_dict().items():
            if name.endswith('bias') and not bias:
                tensor.zero_()
                continue
            conv1d = name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
            state[f'_orig_mod.{name}'] = tensor.T.contiguous() if conv1d else tensor
        arguments = {'n_layer': 2, 'n_head': 4, 'n_embd': 32, 'block_size': 16, 'vocab_size': 40}
        checkpoint = {
            'model': state,
            'optimizer': {'state': {}, 'param_groups': []},
            'model_args': {**arguments, 'bias': bias, 'dropout': 0.1},
            'iter_num': 5,
            'best_val_loss': torch.tensor(2.5),
            'config': {'dataset': 'shakespeare_char'},
        }
        torch.save(checkpoint, tmp_path / 'ckpt.pt')
        return interop.open_checkpoint(f'nanogpt:{tmp_path}'), theirs

    return write


@pytest.mark.parametrize('bias', [True, False])
def test_nanogpt_checkpoint_loads(nanogpt_checkpoint, bias):
    source, theirs = nanogpt_checkpoint(bias)
    legacy = ModelArchitectureConfig(
        arch_preset='legacy', **GPT2_SIZES, block_size=16, vocab_size=40, bias=bias
    )
    assert source.config.to_dict() == legacy.to_dict()
    assert source.config.preset == 'legacy'
    assert_same_logits(source, theirs)


# --- Training from pretrained weights -------------------------------------------------------------


def test_training_from_pretrained_weights_and_resume(tiny_dataset, tmp_path):
    folder, sizes = tmp_path / 'theirs', {'vocab_size': 256, 'max_position_embeddings': 64}
    theirs = reference.randomized_model({**CONFIGS['llama-grouped-tied'], **sizes})
    reference.saved(theirs, folder)
    # The options of TINY_RUN agree with the model or have no effect, but for n_head.
    options = {'n_head': 4, 'arch_preset': 'gpt2', 'dropout': 0.1, 'block_size': 16}
    run = train_here(tiny_dataset, tmp_path / 'out', init_from=f'hf:{folder}', **options)
    assert run.code == 0
    tokens, targets = joined(run.evaluated_on[:2])  # 4 windows of the training split
    with torch.no_grad():
        expected = F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten())
    loss = run.record['eval_steps'][0]['train_loss']
    assert loss == pytest.approx(expected.item(), rel=1e-5)

    weights_from = run.record['metadata']['weights_from']
    assert weights_from['source'] == f'hf:{folder}'
    assert weights_from['architecture'] == 'LlamaForCausalLM'
    assert set(weights_from['files']) == {'config.json', 'model.safetensors'}
    assert run.record['config']['dropout'] == 0.1
    assert run.record['config']['rope_theta'] == 50.0

    for path in folder.iterdir():
        path.unlink()
    again = train_here(
        tiny_dataset, tmp_path / 'out', init_from='resume', n_head=4, block_size=16, max_iters=6
    )
    assert again.code == 0
    assert again.record['metadata']['weights_from'] == weights_from
    assert again.record['config']['init_from'] == 'resume'


@pytest.fixture
def short_llama(tmp_path):
    """A Llama of transformers with 16 positions and 256 tokens, and its folder."""
    folder = tmp_path / 'short'
    theirs = reference.randomized_model({**CONFIGS['llama-grouped-tied'], 'vocab_size': 256})
    reference.saved(theirs, folder)
    return theirs, folder


@pytest.mark.parametrize(
    ('scaling', 'options', 'rope_fields'),
    [
        ('linear', {}, {}),
        ('yarn', {}, {'original_max_position_embeddings': 16}),
        (
            'llama3',
            {'rope_scaling_factor': 8.0},
            {
                'factor': 8.0,
                'original_max_position_embeddings': 16,
                'low_freq_factor': 1.0,
                'high_freq_factor': 4.0,
            },
        ),
    ],
)
def test_rope_extension_to_a_longer_context(
    short_llama, tiny_dataset, tmp_path, scaling, options, rope_fields
):
    """Before the first update the loss is that of transformers' model with the same scaling."""
    model, folder = short_llama
    options = {'n_head': 4, 'rope_scaling': scaling, **options}
    run = train_here(
        tiny_dataset,
        tmp_path / 'out',
        init_from=f'hf:{folder}',
        block_size=48,
        eval_only=True,
        **options,
    )
    expected = reference.randomized_model(
        {
            **CONFIGS['llama-grouped-tied'],
            **rotary(rope_type=scaling, **{'factor': 3.0, **rope_fields}),
            'vocab_size': 256,
            'max_position_embeddings': 48,
        }
    )
    expected.load_state_dict(model.state_dict())
    tokens, targets = joined(run.evaluated_on[:2])
    with torch.no_grad():
        loss = F.cross_entropy(expected(tokens).logits.flatten(0, 1), targets.flatten()).item()
        unscaled = F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten()).item()
    train_loss = run.record['eval_steps'][0]['train_loss']
    assert train_loss == pytest.approx(loss, rel=1e-5) != pytest.approx(unscaled, rel=1e-5)
    assert run.events('note') == []


@pytest.mark.slow
def test_scaling_without_a_longer_context_is_refused(short_llama, tiny_dataset, tmp_path, train):
    folder = short_llama[1]
    common = (f'--init_from=hf:{folder}', '--n_head=4')
    error = train(*common, '--rope_scaling=yarn', '--block_size=16', code=2).stderr
    assert "rope_scaling='yarn' extends the context beyond the 16 tokens of init_from" in error
    assert error.count('init_from') == 1
    run = train_here(
        tiny_dataset, tmp_path / 'long', init_from=f'hf:{folder}', n_head=4, eval_only=True
    )
    (note,) = run.events('note')
    assert 'block_size=32' in note['message'] and '--rope_scaling=yarn' in note['message']


@pytest.mark.slow
def test_finetuning_gpt2(tiny_dataset, tmp_path, train, monkeypatch):
    """The config file loads from the cache, crops, trains, and resumes without the cache."""
    home = tmp_path / 'home/hub/models--openai-community--gpt2'
    theirs = reference.randomized_model({**GPT2, 'vocab_size': 256})
    reference.saved(theirs, home / 'snapshots/1')
    (home / 'refs').mkdir()
    (home / 'refs/main').write_text('1')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
    config = PROJECT / 'config/finetune_shakespeare.py'
    options = {'n_head': 4, 'block_size': 8, 'max_iters': 20, 'learning_rate': 0.01}
    options |= {'batch_size': 8, 'eval_interval': 10}
    arguments = [f'--{key}={value}' for key, value in options.items()]
    train(config, f'--out_dir={tmp_path / "out"}', *arguments)
    record = read_record(latest_run(tmp_path / 'out'))
    assert record['metadata']['weights_from']['source'] == 'gpt2'
    assert record['metadata']['weights_from']['architecture'] == 'GPT2LMHeadModel'
    assert [record['config'][key] for key in ('dropout', 'decay_lr')] == [0.1, False]
    assert {entry['lr'] for entry in record['training_iterations']} == {0.01}
    losses = [entry['train_loss'] for entry in record['eval_steps']]
    assert losses[-1] < 0.8 * losses[0], losses

    shutil.rmtree(tmp_path / 'home')
    longer = {**options, 'max_iters': 30, 'init_from': 'resume', 'dropout': 0.1}
    again = train_here(tiny_dataset, tmp_path / 'out', **longer)
    assert again.record['metadata']['weights_from'] == record['metadata']['weights_from']
    assert again.record['eval_steps'][-1]['iter'] == 30
    assert again.record['eval_steps'][-1]['train_loss'] < losses[0]
    # The initial loss: that of transformers on the 4 evaluated windows of 8 tokens.
    tokens, targets = joined(again.evaluated_on[:1])
    with torch.no_grad():
        loss = F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten()).item()
    assert losses[0] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_contradicting_options_are_refused(nanogpt_checkpoint, tmp_path, train):
    nanogpt_checkpoint(True)
    error = train(
        f'--init_from=nanogpt:{tmp_path}',
        '--n_head=4',
        '--normalization=rmsnorm',
        '--initialization=mup',
        '--vocab_size=256',
        code=2,
    ).stderr
    assert "normalization='rmsnorm' (command line) contradicts init_from=nanogpt:" in error
    assert "which has 'layernorm'. Remove normalization" in error
    assert "initialization='mup' (command line) contradicts" in error  # it scales the logits
    assert 'block_size=32: init_from=nanogpt:' in error and '--block_size=16' in error
    assert 'n_head' not in error and 'vocab_size' not in error
    error = train(f'--init_from=nanogpt:{tmp_path}', '--n_head=4', '--block_size=16', code=2).stderr
    assert 'vocab_size=40 (nanogpt:' in error
    assert 'at least 256 is needed. Set --vocab_size=256' in error


@pytest.mark.parametrize(
    'values', [{'initialization': 'normal'}, {'initialization': 'mup', 'mup_base_width': 16}]
)
def test_initialization_is_not_exported(values):
    expression = interop.convert_config(tiny(arch_preset='legacy', **values))
    assert expression.family.architecture == 'GPT2LMHeadModel'


# --- Export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'norm_position': 'sandwich'}, "norm_position='sandwich'. The closest.* GPT2LMHeadModel"),
        ({'position_encoding': 'none'}, "position_encoding='none'"),
        ({'activation': 'leaky_relu'}, "architecture: activation='leaky_relu'"),
        ({'logit_softcap': 3.0}, 'architecture: logit_softcap=3.0'),
        ({'initialization': 'mup'}, "architecture: initialization='mup'"),
        ({'arch_preset': 'llama', 'normalization': 'dyt'}, "normalization='dyt'"),
        ({'arch_preset': 'mistral', 'ffn_type': 'bilinear'}, "ffn_type='bilinear'"),
    ],
)
def test_inexpressible_options_are_named(values, message, tmp_path):
    config = tiny(**{'arch_preset': 'legacy', **values})
    with pytest.raises(UserError, match=message):
        interop.export(config, {}, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
