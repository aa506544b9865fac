"""A config file of version 0.1.0, with the components and import paths of that version."""

import torch
from components.contract import Initial
from registry import Option, above

from model_components import Activation, Norm, PositionEncoding, Positions
from model_config import ACTIVATION_REGISTRY, NORM_REGISTRY, POSITION_ENCODING_REGISTRY


@NORM_REGISTRY.register('power_norm', source='made up')
class PowerNorm(Norm):
    tag = 'Power'
    options = {
        **Norm.options,
        'norm_power': Option(float, 2.0, 'Exponent of the power norm', check=above(0)),
    }

    def __init__(self, config, width):
        super().__init__(config, width)
        self.power = config.norm_power

    def forward(self, x):
        x = x.float()
        mean = x.abs().pow(self.power).mean(-1, keepdim=True) + self.eps
        return self.weight * x / mean.pow(1 / self.power)


@ACTIVATION_REGISTRY.register('star_relu', source='Yu et al. 2022')
class StarReLU(Activation):
    tag = 'StarReLU'

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.empty(1))
        self.initial_values = lambda: {'scale': Initial.constant(0.8944)}

    def forward(self, x):
        return self.scale * torch.relu(x).square()


@POSITION_ENCODING_REGISTRY.register('slopes', source='Press et al. 2022')
class Slopes(PositionEncoding):
    tag = 'Slopes'
    has_bias = True

    def __init__(self, config):
        super().__init__(config)
        self.n_head = config.n_head

    def prepare(self, q_positions, k_positions):
        heads = torch.arange(1, self.n_head + 1, device=q_positions.device)
        slopes = 2.0 ** (-8.0 * heads / self.n_head)
        distance = (q_positions[:, None] - k_positions[None, :]).float()
        return Positions(bias=-slopes[:, None, None] * distance)


arch_preset = 'gpt2'
normalization = 'power_norm'
position_encoding = 'slopes'
activation = 'star_relu'
norm_power = 3
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
batch_size = 2
gradient_accumulation_steps = 1
max_iters = 6
eval_interval = 3
eval_iters = 4
warmup_iters = 2
log_interval = 1
device = 'cpu'
dtype = 'float32'
peak_tflops = 0.01
dataset = 'data_small'
