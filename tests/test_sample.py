"""sample.py and the samples of a training run: their text, their messages, their errors."""

import copy
import hashlib
import io
import json
import random
import re
import shutil
import sys
from types import SimpleNamespace

import jsonschema
import pytest
import torch
from helpers.in_process import train_here
from helpers.project import PROJECT, TINY_RUN
from torch._dynamo.utils import counters

import sample
import train
from common import hardware
from common.console_output import visible
from common.errors import UserError, run_script
from data.gpt2_vocabulary import byte_characters
from data.tokenizer import Tokenizer
from inference import text_generator, text_output
from inference.generate import generate
from inference.sampling import PeriodicSample, Sampler
from training.checkpoint import index_sha256, read_index
from training.load import find_checkpoint, load_model, load_tokenizer

pytestmark = pytest.mark.slow

LETTERS = 'abcdefé😀\n '
OPTIONS = {'temperature': 50.0, 'max_new_tokens': 40, 'num_samples': 3, 'start': 'abc'}


def write_dataset(folder, **tokenizer):
    """A dataset of random letters, in documents of a dozen if the tokenizer marks their end."""
    folder.mkdir()
    ends = tokenizer.get('end_of_text', False)
    vocab_size = len(LETTERS) + ends
    splits = {}
    for split, count in (('train', 3000), ('val', 500)):
        tokens = bytes(random.Random(split).choices(range(vocab_size), k=count))
        (folder / f'{split}.bin').write_bytes(tokens)
        splits[split] = {'tokens': count, 'bytes': None}
    meta = {
        'format_version': 1,
        'tokenizer': {'kind': 'char', 'characters': list(LETTERS), **tokenizer},
        'vocab_size': vocab_size,
        'dtype': 'uint8',
    }
    (folder / 'meta.json').write_text(json.dumps({**meta, 'splits': splits}))
    return folder


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with two runs of one iteration: `plain`, and `documents` with ends of text."""
    folder = tmp_path_factory.mktemp('samples')
    for name, tokenizer in (('plain', {}), ('documents', {'end_of_text': True})):
        dataset = write_dataset(folder / f'{name}_data', **tokenizer)
        values = {'max_iters': 1, 'n_layer': 1, 'block_size': 16, 'vocab_size': 64}
        train_here(dataset, folder / name, **values)
        shutil.rmtree(dataset)  # the checkpoint has all that sampling needs
    return folder


@pytest.fixture
def written(trained, capsys):
    """written('plain', seed=2): the output of sample.py as (texts, the lines around them)."""

    def run(name='plain', *flags, code=0, **options):
        values = {'out_dir': trained / name, 'device': 'cpu', **OPTIONS, **options}
        argv = [f'--{key}={value}' for key, value in values.items()]
        with pytest.raises(SystemExit) as exit:
            run_script(sample.main, [*argv, '--dtype=float32', *flags])
        out, errors = capsys.readouterr()
        assert exit.value.code == code, errors
        head, *texts, tail = out.split(f'{text_output.SEPARATOR}\n')
        return [text.removesuffix('\n') for text in texts], head, tail

    return run


def model_of(folder):
    checkpoint, state = find_checkpoint(str(folder), None)
    return load_model(checkpoint, state, torch.device('cpu')).eval()


def test_texts_match_model_beyond_context(trained, written):
    texts, head, _ = written(temperature=0)
    tokenizer = Tokenizer({'kind': 'char', 'characters': list(LETTERS)})
    choose = Sampler(len(LETTERS), temperature=0)
    drawn = generate(
        model_of(trained / 'plain'), torch.tensor([tokenizer.encode('abc')]), 40, choose=choose
    )
    expected = 'abc' + tokenizer.decode([token.item() for token in drawn])
    assert texts == [expected] * 3 and len(expected) == 43
    assert ', iteration 1, from ' in head and 'iter_00000001' in head


def test_text_depends_on_seed_and_number_only(written):
    together, *_ = written()
    assert len(set(together)) == 3 and all(len(text) == 43 for text in together)
    for options in ({'batch_size': 1}, {'batch_size': 2}, {'num_samples': 2}):
        texts, *_ = written(**options)
        assert texts == together[: len(texts)]
    assert len({*together, *written(seed=2)[0]}) == 6
    letters = {letter for text in together for letter in text}
    assert letters == set(LETTERS)  # no token from the padding of the vocabulary


def test_text_ends_before_first_stop_string(written):
    whole, *_ = written()
    for batch_size in (1, 3):
        texts, *_ = written(
            'plain', '--stop=é', '--stop=fb', '--stop=nowhere', batch_size=batch_size
        )
        expected = ['abc' + re.split('é|fb', text[3:])[0] for text in whole]
        assert texts == expected != whole


def test_text_ends_at_end_of_text_token(written):
    whole, *_ = written('documents', '--ignore_end_of_text')
    texts, _, tail = written('documents')
    expected = [text.partition('<|endoftext|>')[0] for text in whole]
    assert texts == expected != whole
    # The end-of-text token counts as a drawn token.
    drawn = [min(40, len(text) - 3 + 1) for text in texts]
    assert f'new: {sum(drawn):,} tokens' in tail and sum(drawn) < 120
    # A document begins after the end-of-text token of the previous one.
    (text,), *_ = written('documents', '--ignore_end_of_text', start='', num_samples=1)
    assert text and not text.startswith('abc')


def test_empty_prompt_needs_end_of_text(trained):
    with pytest.raises(UserError, match=r'no end-of-text token.*--start='):
        sample.main([f'--out_dir={trained / "plain"}', '--device=cpu', '--start='])


@pytest.mark.parametrize('start', ['-', 'FILE:-', 'FILE:prompt.txt'])
def test_prompt_from_file_or_stdin(written, tmp_path, monkeypatch, start):
    (expected,), *_ = written(num_samples=1, start='é😀\nb')
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'prompt.txt').write_bytes('é😀\nb'.encode())
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO('é😀\nb'.encode())))
    (text,), *_ = written(num_samples=1, start=start)
    assert text == expected and text.startswith('é😀\nb')


def test_single_text_is_streamed(written, monkeypatch):
    shown, write_text = [], text_output.write_text

    def show(text, **options):
        shown.append(text)
        write_text(text, **options)

    for module in (sample, text_output):
        monkeypatch.setattr(module, 'write_text', show)
    (text,), *_ = written(num_samples=1)
    # Between the prompt and the line end, each token is one letter.
    assert shown[2:-2] == list(text[3:])
    shown.clear()
    written()
    assert len(shown) == 1 + 3 + 1


def test_ctrl_c_keeps_written_text(written, monkeypatch):
    whole, *_ = written()

    def interrupted(*arguments, **options):
        for number, tokens in enumerate(generate(*arguments, **options)):
            if number == 7:
                raise KeyboardInterrupt
            yield tokens

    monkeypatch.setattr(text_generator, 'generate', interrupted)
    for batch_size, count in ((3, 3), (1, 1)):
        texts, _, tail = written(code=130, batch_size=batch_size)
        assert texts == [text[: 3 + 7] for text in whole[:count]]
        assert f'new: {7 * count} tokens' in tail


def test_generation_speed(monkeypatch):
    times = iter([0.0, 0.5, 0.6, 0.7, 10.0, 10.5, 10.7])
    monkeypatch.setattr(text_output.time, 'perf_counter', lambda: next(times))
    speed = text_output.GenerationSpeed()
    assert str(speed) == 'prompt: 0 tokens; new: 0 tokens'
    for prompt, steps in ((3000, (3, 3, 1)), (1000, (1, 1))):
        speed.begin(prompt)
        for tokens in steps:
            speed.step(tokens)
    # 4,000 prompt tokens in 0.5 + 0.5 s. Of 9 new tokens, 4 come with the prompts, the other 5 in
    # 0.1 + 0.1 + 0.2 s.
    assert str(speed) == 'prompt: 4,000 tokens, 4,000.0 tokens/s; new: 9 tokens, 12.5 tokens/s'


def test_summary_counts_tokens(written):
    _, _, tail = written(batch_size=2, num_samples=3, max_new_tokens=20)
    counted = re.fullmatch(
        r'prompt: 9 tokens, [\d,.]+ tokens/s; new: 60 tokens, [\d,.]+ tokens/s\n', tail
    )
    assert counted, tail
    _, _, tail = written(start='abc' * 20)  # the context is 16 tokens
    assert tail.startswith('prompt: 48 tokens, ')


def test_checkpoint_without_tokenizer_needs_dataset(trained, tmp_path):
    folder = tmp_path / 'old'
    shutil.copytree(trained / 'plain', folder)
    (path,) = folder.glob('run_*/checkpoints/iter_*/index.json')
    index = json.loads(path.read_text())
    del index['data']
    index['sha256'] = index_sha256(index)
    path.write_text(json.dumps(index))
    checkpoint = read_index(path.parent)
    with pytest.raises(UserError, match='plain_data') as refused:
        load_tokenizer(checkpoint)
    assert 'did not store the tokenizer' in str(refused.value)
    dataset = write_dataset(tmp_path / 'data')
    checkpoint.index['config']['dataset'] = str(dataset)
    tokenizer, vocab_size = load_tokenizer(checkpoint)
    assert vocab_size == len(LETTERS) and tokenizer.decode([6, 7]) == 'é😀'


def test_tokenizer_file_is_kept_with_run(written, tmp_path):
    """The tokenizer has byte pairs trained on the corpus: 256 bytes, `ab` and the end of text."""
    characters = byte_characters()
    vocabulary = {characters[byte]: byte for byte in range(256)} | {'ab': 256}
    content = json.dumps({'model': {'vocab': vocabulary}}).encode()
    digest = hashlib.sha256(content).hexdigest()
    data = tmp_path / 'data'
    write_dataset(data, kind='bpe', file='tokenizer.json', sha256=digest)
    (data / 'tokenizer.json').write_bytes(content)
    run = train_here(data, tmp_path / 'out', max_iters=1, n_layer=1, vocab_size=258)
    shutil.rmtree(data)
    (text,), _, tail = written(out_dir=tmp_path / 'out', start='abab', num_samples=1)
    assert text.startswith('abab') and 'prompt: 2 tokens' in tail
    (run.folder / 'tokenizer.json').unlink()
    with pytest.raises(UserError, match=r'tokenizer\.json cannot be used: .*No such file'):
        sample.main([f'--out_dir={tmp_path / "out"}', '--device=cpu'])


# --- Samples of a training run --------------------------------------------------------------------

RUN = {'max_iters': 4, 'eval_interval': 2, 'dropout': 0.1, 'n_layer': 1, 'eval_iters': 2}
SAMPLING = {'sample_interval': 2, 'sample_prompt': 'the ', 'sample_tokens': 40}


def samples_of(run) -> dict[int, dict]:
    return {e['iter']: e['sample'] for e in run.record['eval_steps'] if 'sample' in e}


def plain(run) -> tuple[list, list]:
    """The measurements of a run, without times and samples."""
    lists = run.record['training_iterations'], run.record['eval_steps']
    left_out = ('time_ms', 'tokens_per_sec', 'mfu', 'memory', 'sample', 'train_seconds')
    return tuple([{k: v for k, v in e.items() if k not in left_out} for e in o] for o in lists)


@pytest.fixture(scope='module')
def sampled(tiny_dataset, tmp_path_factory):
    """A run that writes samples."""
    return train_here(tiny_dataset, tmp_path_factory.mktemp('sampled'), **RUN, **SAMPLING)


def test_samples_do_not_change_training(sampled, tiny_dataset, tmp_path):
    without = train_here(tiny_dataset, tmp_path, **RUN)
    assert samples_of(without) == {} and list(samples_of(sampled)) == [0, 2, 4]
    assert plain(sampled) == plain(without)
    for name, weight in without.weights().items():
        assert torch.equal(weight, sampled.weights()[name]), name
    jsonschema.validate(
        sampled.record, json.loads((PROJECT / 'records/record_schema.json').read_text())
    )


def test_sample_leaves_session_unchanged(sampled):
    session = sampled.session
    session.model.eval()
    before = torch.get_rng_state()
    first = session.write_sample()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in session.raw_model.parameters())
    assert not any(module.training for module in session.raw_model.modules())
    assert session.write_sample()['text'] == first['text'] == samples_of(sampled)[4]['text']


def test_periodic_sample_matches_sample_py(sampled, written):
    sample = samples_of(sampled)[4]
    options = {'start': 'the ', 'temperature': 0.8, 'seed': sampled.session.settings.run.seed}
    texts, *_ = written(**options, out_dir=sampled.folder.parent)
    assert texts[0] == visible(sample['prompt'] + sample['text'])
    assert sample['text'] != samples_of(sampled)[0]['text']


def test_resumed_run_writes_same_samples(sampled, tiny_dataset, tmp_path):
    train_here(tiny_dataset, tmp_path, **{**RUN, **SAMPLING, 'max_iters': 2, 'lr_decay_iters': 4})
    options = {'max_iters': 4, 'init_from': 'resume'}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('helpers.in_process.TINY_RUN', {'device': 'cpu', 'dtype': 'float32'})
        resumed = train_here(tiny_dataset, tmp_path, **options)
    texts = [{n: sample['text'] for n, sample in samples_of(r).items()} for r in (resumed, sampled)]
    assert texts[0] == texts[1] and len(texts[0]) == 3


def test_sample_time_is_not_counted(tiny_dataset, tmp_path, monkeypatch):
    now = [0.0]

    def clock():
        now[0] += 0.001
        return now[0]

    def slow_write(self, model):
        now[0] += 1000
        return {'prompt': '', 'text': '', 'time_ms': 1e6}

    for module in (hardware, train):
        monkeypatch.setattr(module, 'time', SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(PeriodicSample, 'write', slow_write)
    run = train_here(tiny_dataset, tmp_path, **RUN, **SAMPLING)
    entries = [*run.record['training_iterations'], *run.record['eval_steps']]
    assert len(entries) == 4 + 3 and len(samples_of(run)) == 3
    assert max(entry['time_ms'] for entry in entries) < 1e5


def test_samples_at_intervals_and_at_end(tiny_dataset, tmp_path):
    options = {**RUN, 'max_iters': 5, 'eval_interval': 1}
    run = train_here(tiny_dataset, tmp_path, **options, sample_interval=2, sample_tokens=1)
    assert list(samples_of(run)) == [0, 2, 4, 5] and len(run.record['eval_steps']) == 6
    assert {sample['prompt'] for sample in samples_of(run).values()} == {'\n'}


def test_sampling_does_not_recompile_blocks(sampled):
    model = copy.deepcopy(sampled.session.raw_model)
    for block in model.blocks:
        block.compile(backend='eager')
    torch._dynamo.reset()  # do not count what other tests of this process compiled
    counters.clear()
    text = sampled.session.sample_writer.write(model)['text']
    assert counters['frames']['total'] == 0 and text == samples_of(sampled)[4]['text']
    with torch.no_grad():
        model(torch.zeros((1, 8), dtype=torch.long))
    assert counters['frames']['total'] > 0  # compiled blocks are counted


def test_nonfinite_logits_give_no_sample(sampled):
    model = copy.deepcopy(sampled.session.raw_model)
    torch.nn.init.constant_(model.token_embedding.weight, float('nan'))
    assert sampled.session.sample_writer.write(model)['text'] is None


def test_periodic_sample_ends_at_end_of_text(tmp_path):
    dataset = write_dataset(tmp_path / 'data', end_of_text=True)
    run = train_here(dataset, tmp_path / 'out', **RUN, **{**SAMPLING, 'sample_prompt': ''})
    assert all(len(sample['text']) < 40 for sample in samples_of(run).values())
    (last,) = run.trained_on[-1:]
    assert last[0].max() == len(LETTERS)  # the token is there


@pytest.mark.parametrize(
    ('tokenizer', 'prompt', 'words'),
    [
        ({'kind': 'unknown'}, 'a', "'unknown'"),
        ({}, 'xyz', "does not have 'x' 'y' 'z'"),
        ({}, '', '--sample_prompt is empty'),
    ],
)
def test_impossible_samples_are_refused_at_start(tokenizer, prompt, words, tmp_path, capsys):
    dataset = write_dataset(tmp_path / 'data', **tokenizer)
    values = {**TINY_RUN, 'dataset': dataset, 'out_dir': tmp_path / 'out', 'eval_interval': 2}
    values |= {'sample_interval': 2, 'sample_prompt': prompt}
    with pytest.raises(SystemExit) as exit:
        run_script(train.main, [f'--{key}={value}' for key, value in values.items()])
    message = capsys.readouterr().err
    assert exit.value.code == 2 and words in message and message.count('\n') == 1
    assert 'sample_interval=2: no text can be generated (--sample_interval=0' in message
    assert not list(tmp_path.glob('out/run_*'))
