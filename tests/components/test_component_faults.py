"""Errors in a component of a config file: one message with class, method, line; exit code 2."""

import re
from types import SimpleNamespace

import pytest
import torch
from helpers.architectures import tiny
from helpers.project import TINY_RUN
from torch import nn

import train
from common import registry
from common.errors import UserError, run_script
from components.faults import explain, is_foreign
from components.weight_initialization import name_seed
from model_builder import build_model, check_calls, parameter_groups
from model_components import Activation, AttentionInputs, AuxOutput, Initial
from model_config import (
    ACTIVATION_REGISTRY,
    ATTENTION_REGISTRY,
    FFN_REGISTRY,
    INITIALIZATION_REGISTRY,
    NORM_POSITION_REGISTRY,
    NORM_REGISTRY,
    POSITION_ENCODING_REGISTRY,
)
from optim.optimizers import OptimizerComponent, torch_groups
from parallel.strategies import SingleProcess
from training_config import OPTIMIZER_REGISTRY, SCHEDULE_REGISTRY

pytestmark = pytest.mark.usefixtures('one_thread')


def build(registry_, base, **attributes):
    """A model with a component Own of the registry with these attributes."""
    if isinstance(base, str):
        base = registry_[base]
    registry_.register('mine')(type('Own', (base,), attributes))
    config = tiny(**{registry_.option: 'mine'})
    check_calls(config)
    return build_model(config, 'cpu', seed=1)


@pytest.fixture(autouse=True)
def own_registries(monkeypatch):
    """Undoes the registrations of each test."""
    for each in registry.ALL_REGISTRIES:
        monkeypatch.setattr(each, '_components', dict(each.registered()))


# --- What methods return --------------------------------------------------------------------------

AUXILIARY = AuxOutput(0.0, {})


@pytest.mark.parametrize(
    ('registry_', 'base', 'method', 'function', 'expected'),
    [
        (ACTIVATION_REGISTRY, 'gelu', 'forward', lambda self, x: None, 'None'),
        (ACTIVATION_REGISTRY, 'gelu', 'forward', lambda self, x: x[..., :-1], '(2, 6, 63)'),
        (ACTIVATION_REGISTRY, 'gelu', 'forward', lambda self, x: x.double(), 'torch.float64'),
        (ACTIVATION_REGISTRY, 'gelu', 'forward', lambda self, x: x > 0, 'torch.bool'),
        (NORM_REGISTRY, 'rmsnorm', 'forward', lambda self, x: x.mean(-1), '(2, 6)'),
        (
            ATTENTION_REGISTRY,
            'standard',
            'forward',
            lambda self, x, positions: (x, None),
            'a tuple',
        ),
        (FFN_REGISTRY, 'standard', 'forward', lambda self, x: x, 'a tensor (2, 6, 16) alone'),
        (FFN_REGISTRY, 'standard', 'forward', lambda self, x: (x, 0.0), 'float 0.0'),
        (FFN_REGISTRY, 'standard', 'forward', lambda self, x: (x[:1], AUXILIARY), '(1, 6, 16)'),
        (
            FFN_REGISTRY,
            'standard',
            'forward',
            lambda self, x: (x, AuxOutput(x, {})),
            'a number as its loss',
        ),
        (
            FFN_REGISTRY,
            'standard',
            'forward',
            lambda self, x: (x, AuxOutput(0.0, {'a': 1.0})),
            'a dict of tensors',
        ),
        (NORM_POSITION_REGISTRY, 'pre', 'forward', lambda self, x, positions: x, 'alone'),
        (POSITION_ENCODING_REGISTRY, 'rope', 'embed', lambda self, x, places: x[0], '(6, 16)'),
        (POSITION_ENCODING_REGISTRY, 'rope', 'prepare', lambda self, q, k: None, 'None'),
        (
            POSITION_ENCODING_REGISTRY,
            'alibi',
            'prepare',
            lambda self, q, k: AttentionInputs(bias=torch.zeros(len(q), len(k))),
            'a bias (heads or 1, 6, 6)',
        ),
        (
            POSITION_ENCODING_REGISTRY,
            'rope',
            'rotate',
            staticmethod(lambda x, rotation: x[..., :1]),
            '(2, 4, 6, 1)',
        ),
    ],
)
def test_wrong_output_error_names_class_method_and_expectation(
    registry_, base, method, function, expected
):
    with pytest.raises(UserError) as refused:
        build(registry_, base, **{method: function})
    message = str(refused.value)
    assert message.startswith(f"{registry_.option}='mine': Own.{method} must return")
    assert expected in message and 'and ' in message


# --- What begins how ------------------------------------------------------------------------------


def weighted(values) -> dict:
    """Attributes of an activation with its own weight and these initial values."""

    def __init__(self, config):
        Activation.__init__(self, config)
        self.weight = nn.Parameter(torch.empty(2))

    return {'__init__': __init__, 'initial_values': lambda self: values}


@pytest.mark.parametrize(
    ('values', 'expected'),
    [
        ({}, 'is not initialized: Own.initial_values() must return an entry for'),
        (None, 'Own.initial_values() must return a dict'),
        ({'weight': 1.0}, 'Own.initial_values() must return a dict'),
        ({'weight': Initial.ones, 'wieght': Initial.ones}, "names 'wieght', which is no parameter"),
        (
            {'weight': lambda tensor: None},
            "['weight'], called with a tensor (2,)",
        ),
        ({'weight': lambda tensor, generator: tensor.fill_(1 / 0)}, 'raised ZeroDivisionError'),
        ({'weight': Initial.constant(float('nan'))}, 'values in the tensor that are not finite'),
    ],
)
def test_initial_values_must_name_every_parameter(values, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        build(ACTIVATION_REGISTRY, 'gelu', **weighted(values))


class Inside(Activation):
    """Parameters in a torch module and a constant, all with initial values."""

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.LayerNorm(config.d_ff)
        self.register_buffer('table', torch.empty(5), persistent=False)

    def initial_values(self):
        table = Initial.normal(1.0)
        return {'norm.weight': Initial.ones, 'norm.bias': Initial.zeros, 'table': table}

    def forward(self, x):
        return self.norm(x.float()) + self.table.sum()


def test_initial_values_of_inner_modules_and_buffers():
    ACTIVATION_REGISTRY.register('inside')(Inside)
    models = [build_model(tiny(activation='inside'), 'cpu', seed) for seed in (1, 2)]
    for model in models:
        inner = model.blocks[1].ffn.activation
        assert torch.equal(inner.norm.weight, torch.ones(64)) and not inner.norm.bias.any()
    # A buffer is the same constant in every run, and in no checkpoint.
    tables = [model.blocks[1].ffn.activation.table for model in models]
    stream = torch.Generator().manual_seed(name_seed(0, 'blocks.1.ffn.activation.table'))
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(tables[0], torch.empty(5).normal_(generator=stream))


def test_uninitialized_buffer_or_inner_parameter_is_named():
    class Open(Inside):
        def initial_values(self):
            return {'norm.weight': Initial.ones, 'norm.bias': Initial.zeros}

    ACTIVATION_REGISTRY.register('mine')(Open)
    with pytest.raises(UserError, match=r"activation\.table is not initialized: Open\..*'table'"):
        build_model(tiny(activation='mine'), 'cpu')
    Open.initial_values = lambda self: {'table': Initial.ones}
    with pytest.raises(UserError, match=r"must return an entry for 'norm\.weight'"):
        build_model(tiny(activation='mine'), 'cpu')


@pytest.mark.parametrize(
    ('registry_', 'base', 'attributes', 'expected'),
    [
        (
            INITIALIZATION_REGISTRY,
            'gpt2',
            {'std': classmethod(lambda cls, config, hidden, residual: None)},
            'Own.std must return a standard deviation',
        ),
        (
            FFN_REGISTRY,
            'standard',
            {'residual_weights': lambda self: self.down.weight},
            'a list of parameters, such as [self.output.weight], and returned Parameter.',
        ),
        (FFN_REGISTRY, 'standard', {'matrices': lambda self: [self.up.weight]}, 'return a dict'),
        (
            FFN_REGISTRY,
            'standard',
            {'matrices': lambda self: {self.up.weight: (3,)}},
            'do not add up to those of a parameter (64, 16)',
        ),
        (
            ATTENTION_REGISTRY,
            'standard',
            {'__init__': lambda self, config, layer: nn.Module.__init__(self)},
            'must call super().__init__(config, layer), or set self.spec',
        ),
        (
            NORM_POSITION_REGISTRY,
            'pre',
            {'__init__': lambda self, config, layer: nn.Module.__init__(self)},
            'or set self.attention',
        ),
        (ACTIVATION_REGISTRY, 'gelu', {'__init__': lambda self, config: None}, 'super().__init__'),
        (ACTIVATION_REGISTRY, 'gelu', {'flops': lambda self, seq_len, causal: 7}, 'Own.flops'),
    ],
)
def test_other_component_return_values_are_checked(registry_, base, attributes, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        build(registry_, base, **attributes).blocks[0].flops(4, True)


# --- What a component raises itself ---------------------------------------------------------------


def test_only_foreign_components_are_explained():
    for each in (*registry.ALL_REGISTRIES, OPTIMIZER_REGISTRY, SCHEDULE_REGISTRY):
        for _, component in each.registered():
            ours = component.__module__.partition('.')[0] in ('components', 'optim')
            assert is_foreign(component) is not ours
    try:
        build_model(tiny(), 'cpu').blocks[0].ffn(torch.zeros(1, 1, 3))
    except RuntimeError as error:
        assert explain(error) is None


def test_inherited_method_failing_for_user_class_is_explained():
    class NoDown(FFN_REGISTRY['standard']):
        def __init__(self, config, layer):
            super().__init__(config, layer)
            del self.down

        def forward(self, x):
            return x, AUXILIARY

    FFN_REGISTRY.register('mine')(NoDown)
    with pytest.raises(AttributeError) as raised:
        build_model(tiny(ffn_type='mine'), 'cpu')
    message = str(explain(raised.value))
    assert message.startswith("ffn_type='mine': NoDown.residual_weights raised AttributeError")
    assert 'feed_forward.py, line' in message and "'down'" in message


SOURCE = """
import torch
from model_components import Activation, Initial
from model_config import ACTIVATION_REGISTRY
from optim.schedules import Schedule
from optim.optimizers import AdamW
from training_config import OPTIMIZER_REGISTRY, SCHEDULE_REGISTRY


def helper():
    raise RuntimeError('mine')  # line 11


@ACTIVATION_REGISTRY.register('zz')
class ZZ(Activation):
    def __init__(self, config):
        super().__init__(config)
        DO_INIT

    def forward(self, x):
        DO_FORWARD

    def flops(self, seq_len, causal):
        DO_FLOPS


@SCHEDULE_REGISTRY.register('own')
class OwnSchedule(Schedule):
    @classmethod
    def learning_rate(cls, step, run):
        DO_SCHEDULE


@OPTIMIZER_REGISTRY.register('own')
class OwnOptimizer(AdamW):
    def step(self):
        DO_STEP


activation, optimizer, lr_schedule = 'zz', 'own', 'own'
"""
FINE = {
    'DO_INIT': 'pass',
    'DO_FORWARD': 'return torch.relu(x)',
    'DO_FLOPS': 'return {}',
    'DO_SCHEDULE': 'return 1e-3',
    'DO_STEP': 'super().step()',
}


def train_with(folder, dataset, values: dict, *arguments) -> int:
    """The exit code of a run of SOURCE with these statements."""
    text = SOURCE
    for key, statement in {**FINE, **values}.items():
        text = text.replace(key, statement)
    (folder / 'mine.py').write_text(text)
    flags = [f'--{key}={value}' for key, value in {**TINY_RUN, 'dataset': dataset}.items()]
    with pytest.raises(SystemExit) as exit:
        run_script(train.main, [str(folder / 'mine.py'), *flags, *map(str, arguments)])
    return exit.value.code


@pytest.mark.parametrize(
    ('place', 'message'),
    [
        ('DO_INIT', "activation='zz': ZZ.__init__ raised RuntimeError: mine"),
        ('DO_FORWARD', "activation='zz': ZZ.forward raised RuntimeError: mine"),
        ('DO_FLOPS', "activation='zz': ZZ.flops raised RuntimeError: mine"),
        ('DO_SCHEDULE', "lr_schedule='own': OwnSchedule.learning_rate raised RuntimeError: mine"),
        ('DO_STEP', "optimizer='own': OwnOptimizer.step raised RuntimeError: mine"),
    ],
)
def test_exception_in_user_component_is_one_line(tmp_path, tiny_dataset, capsys, place, message):
    def run(name: str, values: dict, *arguments: str) -> int:
        return train_with(tmp_path, tiny_dataset, values, '--out_dir', tmp_path / name, *arguments)

    code = run('raising', {place: 'helper()'})
    error = capsys.readouterr().err
    assert code == 2 and message in error and 'Traceback' not in error
    assert f'({tmp_path / "mine.py"}, line 11)' in error and len(error.splitlines()) == 1
    run('debug', {place: 'helper()'}, '--debug')
    error = capsys.readouterr().err
    assert 'Traceback' in error and message in error


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'DO_SCHEDULE': 'return None'}, 'OwnSchedule.learning_rate(0, run) must return a number'),
        ({'DO_SCHEDULE': 'return -1.0'}, 'at least 0, and returned -1.0'),
        ({'DO_SCHEDULE': "return float('nan')"}, 'at least 0, and returned nan'),
    ],
)
def test_schedule_without_valid_rate_is_named(tmp_path, tiny_dataset, capsys, values, message):
    assert train_with(tmp_path, tiny_dataset, values, '--out_dir', tmp_path / 'out') == 2
    error = capsys.readouterr().err
    assert message in error and 'Traceback' not in error


@pytest.mark.parametrize(
    ('made', 'message'),
    [
        (lambda groups, run, parallel: [{'params': groups[0].parameters}], 'lacks lr_scale, name'),
        (lambda *all: torch_groups(*all, 'SGD')[:1], 'of 28 parameters: it must take all'),
    ],
)
def test_optimizer_must_take_all_parameters_in_described_groups(made, message):
    class Sgd(OptimizerComponent, torch.optim.SGD):
        def __init__(self, groups, run, parallel):
            super().__init__(made(groups, run, parallel), lr=0.0)

        def state_keys(self, parameter):
            return frozenset()

    OPTIMIZER_REGISTRY.register('mine')(Sgd)
    run = SimpleNamespace(optimizer='mine', weight_decay=0.1)
    groups = parameter_groups(build_model(tiny(), 'cpu', seed=1))
    with pytest.raises(UserError, match=re.escape(message)):
        SingleProcess(run, torch.device('cpu')).build_optimizer(groups, run)


def test_non_causal_component_is_not_trained(tmp_path, tiny_dataset, capsys):
    values = {'DO_FORWARD': 'return x + x.roll(-1, 1)'}
    assert train_with(tmp_path, tiny_dataset, values, '--out_dir', tmp_path / 'out') == 2
    assert 'ZZ.forward is not causal' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
