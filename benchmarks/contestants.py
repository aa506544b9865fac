"""One contestant of a benchmark, as a process that waits for its turns.

    python benchmarks/contestants.py '{"kind": "nanogpt", …}'

`training_speed.py` and `scaling.py` start it. Commands and answers are lines of JSON on standard
input and output; output of libraries goes to standard error. A waiting contestant blocks in a read
and returns unused memory, so that it does not slow down the active one.

Ours is `train.main` with its own loop, without evaluation; each iteration waits for the turn. Peers
run as their users run them, on the same batches in the same order: nanoGPT with the optimizer,
precision, clipping and logging of its train.py; the others with fused AdamW.
"""

import contextlib
import ctypes
import gc
import itertools
import json
import os
import sys
import time
from pathlib import Path

ADAMW = {'weight_decay': 0.1, 'learning_rate': 6e-4, 'betas': (0.9, 0.95)}
GRAD_CLIP = 1.0
BATCHES = 32  # for the peers, which repeat them
NEVER = 10**6  # iterations
SECONDS_A_PRODUCT = 0.15


class Turns:
    """Called before each iteration: returns at once, or waits until the turn of the contestant.

    It sends an answer after the first iteration and after each turn, which is one untimed iteration
    and `steps` timed ones.
    """

    def __init__(self, answers):
        self.answers, self.device = answers, None
        self.updates = self.left = self.steps = 0
        self.began = 0.0
        self.set_aside = (
            0.0  # seconds before the first iteration that are part of the benchmark only
        )
        self.measured: list[tuple[float, float]] = []  # loss and gradient norm of each iteration
        self.facts = dict  # called after the first iteration for further results

    def before_update(self) -> None:
        if self.updates == 0:
            self.began = time.time() - self.set_aside
        elif self.updates == 1:
            self.synchronize()
            times = {'first_began': self.began, 'first_ended': time.time() - self.set_aside}
            self.answer({**times, **self.memory(), **self.facts()})
        elif self.left == 0:
            self.synchronize()
            self.answer({'seconds': time.perf_counter() - self.began, **self.memory()})
        elif self.left == self.steps:
            self.synchronize()
            self.began = time.perf_counter()
        self.left -= 1
        self.updates += 1

    def answer(self, values: dict) -> None:
        """Return unused memory, send the answer, and wait for the next turn."""
        import torch

        gc.collect()
        with contextlib.suppress(AttributeError, OSError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()
        say(self.answers, {**values, 'measured': self.measured})
        self.measured = []
        self.steps = listen()['steps']
        self.left = self.steps + 1

    def synchronize(self) -> None:
        from common import hardware

        hardware.synchronize(self.device)

    def memory(self) -> dict:
        """The peak memory of the process: resident on a CPU, allocated on a GPU."""
        from common import hardware

        return {'peak_gb': hardware.memory_usage(self.device)['peak_gb']}


def say(answers, values: dict) -> None:
    answers.write(json.dumps(values) + '\n')
    answers.flush()


def listen() -> dict:
    """The next command. Ends the process if there are no more."""
    line = sys.stdin.readline()
    if not line:
        os._exit(0)
    return json.loads(line)


# --- Ours -----------------------------------------------------------------------------------------


def arguments(request: dict) -> list[str]:
    """The command line of train.py."""
    shape, folder = request['shape'], request['folder']
    options = {
        **shape['options'],
        'vocab_size': shape['vocab_size'],
        'gradient_accumulation_steps': 1,
        'dataset': f'{folder}/data',
        'out_dir': f'{folder}/out',
        'device': request['device'],
        'dtype': request['dtype'],
        'compile': request.get('compile', False),
        'activation_checkpointing': 'full' if request.get('checkpoint') else 'none',
        'learning_rate': ADAMW['learning_rate'],
        'weight_decay': ADAMW['weight_decay'],
        'beta1': ADAMW['betas'][0],
        'beta2': ADAMW['betas'][1],
        'grad_clip': GRAD_CLIP,
        'decay_lr': False,
        'max_iters': NEVER,
        'eval_interval': NEVER,
        'log_interval': 1,
    }
    return [*(f'--{key}={value}' for key, value in options.items()), *request.get('given', [])]


def ours(request: dict, turns: Turns) -> None:
    """Run train.py."""
    import train
    from common import hardware
    from training.record_header import bytes_sent_per_update

    run_iteration, run_training = train.run_iteration, train.run_training

    def iteration_in_turn(session, clock):
        turns.before_update()
        run_iteration(session, clock)

    def run_in_turn(session):
        turns.device = session.device
        turns.facts = lambda: {
            'parameters': sum(p.numel() for p in session.raw_model.parameters()),
            'flops': session.metrics.flops_per_token,
            'tokens': session.tokens_per_iter,
            'threads': session.environment['threads'],
            'bytes_sent': bytes_sent_per_update(
                session.settings.run, session.raw_model, session.optimizer.inner, session.parallel
            ),
        }
        log = session.logger.iteration

        def log_and_measure(entry):
            log(entry)
            turns.measured.append((entry['loss'], entry['gradients']['norm']))

        session.logger.iteration = log_and_measure
        return run_training(session)

    train.run_iteration, train.run_training, train.evaluate = (
        iteration_in_turn,
        run_in_turn,
        lambda session: False,
    )
    if request.get('without_collectives'):
        without_collectives()
    # Each log entry starts a new interval; here the peak of the whole process counts.
    hardware.reset_peak_memory = lambda device: None
    train.main(arguments(request))


def without_collectives() -> None:
    """Train as the first of several ranks, with collectives that return at once and objects that
    are only exchanged with itself."""
    from parallel import strategies
    from parallel.process_group import MultiProcessGroup, SingleProcessGroup

    def init_process_group(device, timeout):
        return form_make_believe_group(int(os.environ['WORLD_SIZE']))

    strategies.init_process_group = init_process_group
    for name in (
        'all_reduce_sum',
        'all_reduce_max',
        'all_gather_object',
        'broadcast_from_main',
        'propagate_failures',
        'close',
    ):
        setattr(MultiProcessGroup, name, vars(SingleProcessGroup)[name])


def form_make_believe_group(ranks: int) -> tuple:
    """A process group as its first rank, whose collectives return at once with wrong results."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    class Done:
        """A rank count that DDP can read, unlike that of the fake group."""

        def __init__(self, tensor):
            self.tensor = tensor

        def get_future(self):
            future = torch.futures.Future()
            future.set_result([self.tensor])
            return future

    dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=ranks)
    dist.all_reduce = lambda tensor, *_, async_op=False, **__: Done(tensor) if async_op else None
    return dist.HashStore(), dist.group.WORLD


def prepare(request: dict, turns: Turns) -> None:
    """Write the tokens; and for the peers our batches, initial weights and shape."""
    import numpy as np
    import torch

    import interop
    import train
    from benchmarks.record_overhead import random_tokens
    from common.errors import UserError
    from interop.families import NANOGPT

    shape, folder, sessions = request['shape'], Path(request['folder']), []
    (folder / 'data').mkdir()
    random_tokens(folder / 'data', shape['vocab_size'])
    train.run_training = lambda session: sessions.append(session) or 0
    train.main([*arguments(request), '--peak_tflops=1'])
    (session,) = sessions
    config, weights = session.raw_model.config, session.raw_model.named_parameters
    batches = [[t.cpu() for t in session.training_batch(number)] for number in range(BATCHES)]
    np.save(folder / 'batches.npy', np.array(batches))

    def translated(family) -> dict:
        tensors = {}
        for name, tensor in weights():
            tensor_map, names = interop.tensor_map_of(family, name, config)
            written = tensor_map.write(tensor.detach(), config)
            tensors.update((n, t.contiguous()) for n, t in zip(names, written))
        return tensors

    answer = {
        'parameters': sum(tensor.numel() for _, tensor in weights()),
        'flops': session.metrics.flops_per_token,
        'd_ff': config.to_dict()['d_ff'],
        'transformers': None,
    }
    if 'nanogpt' in request['peers']:
        torch.save(translated(NANOGPT), folder / 'nanogpt.pt')
    if 'transformers' in request['peers']:
        try:
            family, fields, variant = interop.convert_config(config)
        except UserError as error:
            answer['transformers_problem'] = str(error)
        else:
            if variant is config:
                answer['transformers'] = fields
                torch.save(translated(family), folder / 'transformers.pt')
            else:
                answer['transformers_problem'] = 'it has biases where ours has none'
    say(turns.answers, answer)


# --- Peers ----------------------------------------------------------------------------------------


def nanogpt(request: dict, turns: Turns) -> None:
    """model.py of nanoGPT with the recipe of its train.py."""
    sys.path.insert(0, request['nanogpt'])
    from model import GPT, GPTConfig

    shape = request['shape']['options']
    keys = ('n_layer', 'n_head', 'n_embd', 'block_size', 'dropout', 'bias')
    config = GPTConfig(
        **{key: shape[key] for key in keys}, vocab_size=request['shape']['vocab_size']
    )
    rates = ADAMW['weight_decay'], ADAMW['learning_rate'], ADAMW['betas']
    peer(
        request,
        turns,
        build=lambda: GPT(config),
        optimizer=lambda model, device: model.configure_optimizers(*rates, device.type),
        loss=lambda model, tokens, targets: model(tokens, targets),
    )


def transformers(request: dict, turns: Turns) -> None:
    """Model and loss of transformers, with fused AdamW as in its Trainer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    no_special_tokens = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))
    config = AutoConfig.for_model(**{**no_special_tokens, **request['fields']})
    config.use_cache = False

    def loss(model, tokens, targets):
        # Labels are already shifted; otherwise it would drop the last position.
        return None, model(input_ids=tokens, labels=targets, shift_labels=targets).loss

    peer(
        request,
        turns,
        build=lambda: AutoModelForCausalLM.from_config(config, attn_implementation='sdpa'),
        optimizer=fused_adamw,
        loss=loss,
    )


def x_transformers(request: dict, turns: Turns) -> None:
    """The decoder of x-transformers, with its flash attention and fused AdamW."""
    from torch.nn.functional import cross_entropy
    from x_transformers import Decoder, TransformerWrapper

    shape = request['shape']['options']
    width, heads = shape['n_embd'], shape['n_head']
    llama = request['shape']['family'] == 'llama'
    layers = {
        'dim': width,
        'depth': shape['n_layer'],
        'heads': heads,
        'attn_dim_head': width // heads,
        'attn_flash': True,
        'attn_dropout': shape['dropout'],
        'ff_dropout': shape['dropout'],
        'ff_mult': request['d_ff'] / width,
        'ff_no_bias': not shape['bias'],
    }
    if llama:
        layers |= {
            'rotary_pos_emb': True,
            'rotary_emb_dim': width // heads,
            'use_rmsnorm': True,
            'ff_glu': True,
            'ff_swish': True,
        }

    def loss(model, tokens, targets):
        return None, cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

    peer(
        request,
        turns,
        build=lambda: TransformerWrapper(
            num_tokens=request['shape']['vocab_size'],
            max_seq_len=shape['block_size'],
            use_abs_pos_emb=not llama,
            tie_embedding=not llama,
            emb_dropout=shape['dropout'],
            attn_layers=Decoder(**layers),
        ),
        optimizer=fused_adamw,
        loss=loss,
    )


def fused_adamw(model, device):
    import torch

    groups = [
        {'params': [p for p in model.parameters() if p.dim() >= 2]},
        {'params': [p for p in model.parameters() if p.dim() < 2], 'weight_decay': 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=ADAMW['learning_rate'],
        betas=ADAMW['betas'],
        weight_decay=ADAMW['weight_decay'],
        fused=True,
    )


def peer(request: dict, turns: Turns, build, optimizer, loss) -> None:
    """Train a peer's model.

    build() returns the model, optimizer(model, device) the optimizer, and loss(model, tokens,
    targets) the values that a user's loop keeps until the next iteration, and the loss.
    """
    import numpy as np
    import torch

    from common import hardware

    device = torch.device(request['device'])
    turns.device = device
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    if request['mallopt']:
        hardware.tune(device, deterministic=False)
    torch.manual_seed(0)
    raw_model = build().to(device).train()
    steps = optimizer(raw_model, device)
    began = time.perf_counter()
    load(raw_model, request)
    turns.set_aside = time.perf_counter() - began
    model = torch.compile(raw_model) if request.get('compile') else raw_model
    turns.facts = lambda: {
        'parameters': sum(p.numel() for p in raw_model.parameters()),
        'flops': {
            'per_token': counted_flops(build, loss, request['shape']['options']['block_size'])
        },
        'tokens': batches[0][0].size,
        'threads': torch.get_num_threads(),
    }
    batches = np.load(Path(request['folder'], 'batches.npy'))
    output = None
    for batch in itertools.cycle(batches):
        tokens, targets = map(torch.from_numpy, batch)
        if device.type == 'cuda':
            tokens, targets = (
                tensor.pin_memory().to(device, non_blocking=True) for tensor in (tokens, targets)
            )
        turns.before_update()
        with hardware.autocast(device, request['dtype']):
            output, value = loss(model, tokens, targets)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), GRAD_CLIP)
        steps.step()
        steps.zero_grad(set_to_none=True)
        turns.measured.append((value.item(), norm.item()))
    del output


def load(model, request: dict) -> None:
    """Load our initial weights, if the model can represent them."""
    import torch

    path = Path(request['folder'], f'{request["kind"]}.pt')
    if path.exists():
        weights = torch.load(path, weights_only=True)
        missing, unknown = model.load_state_dict(weights, strict=False)
        loaded = {model.state_dict()[name].data_ptr() for name in weights}
        lacking = [n for n in missing if model.state_dict()[n].data_ptr() not in loaded]
        assert not lacking and not unknown, (lacking, unknown)


def counted_flops(build, loss, length: int) -> float:
    """Training FLOPs per token, three times those of a forward pass, counted with fake tensors.

    As in `model_builder.training_flops`: attention over the full square.
    """
    import torch
    from torch._subclasses import FakeTensorMode  # meta tensors do not work: masks depend on values
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query, key, value, *_, **__) -> int:
        return sdpa_flop_count(query, key, value)

    # torch has no FLOP count for this operator.
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FakeTensorMode(), torch.no_grad():
        model, tokens = build(), torch.zeros((1, length), dtype=torch.long)
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            loss(model, tokens, tokens)
    return 3.0 * counter.get_total_flops() / length


# --- Peak of the machine --------------------------------------------------------------------------


def products(request: dict, turns: Turns) -> None:
    """Measure the fastest matrix product of each dtype in each turn, in TFLOP/s."""
    import torch

    from common import hardware

    device = torch.device(request['device'])
    hardware.tune(device, deterministic=False)
    while True:
        say(
            turns.answers,
            {
                dtype: best_product(request['products'], dtype, device)
                for dtype in request['dtypes']
            },
        )
        listen()


def best_product(shapes: list[list[int]], dtype: str, device) -> dict:
    """The highest TFLOP/s, and its shape (rows, inner, columns)."""
    import torch

    from common import hardware

    best = {'tflops': 0.0, 'shape': None}
    for rows, inner, columns in shapes:
        x = torch.ones((rows, inner), dtype=getattr(torch, dtype), device=device)
        weight = torch.ones((columns, inner), dtype=x.dtype, device=device)
        torch.nn.functional.linear(x, weight)
        hardware.synchronize(device)
        fastest, now = float('inf'), time.perf_counter()
        deadline = now + SECONDS_A_PRODUCT
        while now < deadline:
            began = now
            torch.nn.functional.linear(x, weight)
            hardware.synchronize(device)
            now = time.perf_counter()
            fastest = min(fastest, now - began)
        tflops = 2 * rows * inner * columns / fastest / 1e12
        best = max(best, {'tflops': tflops, 'shape': [rows, inner, columns]}, key=_tflops)
    return best


def _tflops(product: dict) -> float:
    return product['tflops']


KINDS = {
    'ours': ours,
    'other': ours,
    'prepare': prepare,
    'nanogpt': nanogpt,
    'transformers': transformers,
    'x-transformers': x_transformers,
    'products': products,
}


def main(argv: list[str]) -> int:
    (request,) = map(json.loads, argv)
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    KINDS[request['kind']](request, Turns(answers))
    return 0


if __name__ == '__main__':
    sys.path.insert(0, json.loads(sys.argv[1])['project'])
    from common.errors import run_script

    run_script(main)
