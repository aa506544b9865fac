"""sample.py: what it writes from a checkpoint, and what it says of that."""

import io
import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from in_process import train_here

import checkpointing
import resumption
import sample
from errors import UserError, run_script
from model_builder import generate
from sampling import Sampler
from text_codec import Codec

LETTERS = 'abcdefé😀\n '
OPTIONS = {'temperature': 50.0, 'max_new_tokens': 40, 'num_samples': 3, 'start': 'abc'}


def write_dataset(folder, **tokenizer):
    """Letters in no order, as documents of a dozen where the tokenizer marks their end."""
    folder.mkdir()
    ends = tokenizer.get('end_of_text', False)
    vocab_size = len(LETTERS) + ends
    splits = {}
    for split, count in (('train', 3000), ('val', 500)):
        tokens = bytes(i * i % vocab_size for i in range(count))
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
    """Runs of an update on letters, below one folder: `plain`, and `documents` with their ends."""
    folder = tmp_path_factory.mktemp('samples')
    for name, tokenizer in (('plain', {}), ('documents', {'end_of_text': True})):
        dataset = write_dataset(folder / f'{name}_data', **tokenizer)
        values = {'max_iters': 1, 'n_layer': 1, 'block_size': 16, 'vocab_size': 64}
        train_here(dataset, folder / name, **values)
        shutil.rmtree(dataset)  # what a checkpoint needs of it, it has
    return folder


@pytest.fixture
def written(trained, capsys):
    """written('plain', seed=2): what sample.py shows, as (texts, the lines around them)."""

    def run(name='plain', *flags, code=0, **options):
        values = {'out_dir': trained / name, 'device': 'cpu', **OPTIONS, **options}
        argv = [f'--{key}={value}' for key, value in values.items()]
        with pytest.raises(SystemExit) as exit:
            run_script(sample.main, [*argv, '--dtype=float32', *flags])
        out, errors = capsys.readouterr()
        assert exit.value.code == code, errors
        head, *texts, tail = out.split(f'{sample.SEPARATOR}\n')
        return [text.removesuffix('\n') for text in texts], head, tail

    return run


def model_of(folder):
    checkpoint, state = resumption.find_checkpoint(str(folder), None)
    return resumption.load_model(checkpoint, state, torch.device('cpu')).eval()


def test_the_texts_are_what_the_model_says_beyond_its_context_too(trained, written):
    texts, head, _ = written(temperature=0)
    codec = Codec({'kind': 'char', 'characters': list(LETTERS)})
    choose = Sampler(len(LETTERS), temperature=0)
    drawn = generate(
        model_of(trained / 'plain'), torch.tensor([codec.encode('abc')]), 40, choose=choose
    )
    expected = 'abc' + codec.decode([token.item() for token in drawn])
    assert texts == [expected] * 3 and len(expected) == 43
    assert '1 updates' in head and 'iter_00000001' in head


def test_a_text_hangs_on_its_seed_and_number_alone(written):
    together, *_ = written()
    assert len(set(together)) == 3 and all(len(text) == 43 for text in together)
    for options in ({'batch_size': 1}, {'batch_size': 2}, {'num_samples': 2}):
        texts, *_ = written(**options)
        assert texts == together[: len(texts)]
    assert len({*together, *written(seed=2)[0]}) == 6
    letters = {letter for text in together for letter in text}
    assert letters == set(LETTERS)  # nothing from the padding of the vocabulary


def test_a_text_ends_before_the_first_stop_string(written):
    whole, *_ = written()
    for batch_size in (1, 3):
        texts, *_ = written(
            'plain', '--stop=é', '--stop=fb', '--stop=nowhere', batch_size=batch_size
        )
        expected = ['abc' + re.split('é|fb', text[3:])[0] for text in whole]
        assert texts == expected != whole


def test_a_text_ends_where_its_document_does(written):
    whole, *_ = written('documents', '--ignore_end_of_text')
    texts, _, tail = written('documents')
    expected = [text.partition('<|endoftext|>')[0] for text in whole]
    assert texts == expected != whole
    # The token that ends a text is drawn too.
    drawn = [min(40, len(text) - 3 + 1) for text in texts]
    assert f'new: {sum(drawn):,} tokens' in tail and sum(drawn) < 120
    # The tokens of a document begin after the end of the one before.
    (text,), *_ = written('documents', '--ignore_end_of_text', start='', num_samples=1)
    assert text and not text.startswith('abc')


def test_an_empty_prompt_needs_an_end_of_text(trained):
    with pytest.raises(UserError, match=r'no end-of-text token.*--start='):
        sample.main([f'--out_dir={trained / "plain"}', '--device=cpu', '--start='])


@pytest.mark.parametrize('start', ['-', 'FILE:-', 'FILE:prompt.txt'])
def test_the_prompt_comes_from_a_file_or_standard_input(written, tmp_path, monkeypatch, start):
    (expected,), *_ = written(num_samples=1, start='é😀\nb')
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'prompt.txt').write_bytes('é😀\nb'.encode())
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO('é😀\nb'.encode())))
    (text,), *_ = written(num_samples=1, start=start)
    assert text == expected and text.startswith('é😀\nb')


def test_a_lone_text_is_shown_as_it_comes(written, monkeypatch):
    shown, show = [], sample.show
    monkeypatch.setattr(sample, 'show', lambda text: [shown.append(text), show(text)])
    (text,), *_ = written(num_samples=1)
    assert shown[2:-2] == list(text[3:])  # between the prompt and the line end: a letter a token
    shown.clear()
    written()
    assert len(shown) == 1 + 3 + 1


def test_ctrl_c_leaves_what_was_written(written, monkeypatch):
    whole, *_ = written()

    def interrupted(*arguments, **options):
        for number, tokens in enumerate(generate(*arguments, **options)):
            if number == 7:
                raise KeyboardInterrupt
            yield tokens

    monkeypatch.setattr(sample, 'generate', interrupted)
    for batch_size, count in ((3, 3), (1, 1)):
        texts, _, tail = written(code=130, batch_size=batch_size)
        assert texts == [text[: 3 + 7] for text in whole[:count]]
        assert f'new: {7 * count} tokens' in tail


def test_the_speed_is_that_of_the_tokens_that_count(monkeypatch):
    times = iter([0.0, 0.5, 0.6, 0.7, 10.0, 10.5, 10.7])
    monkeypatch.setattr(sample.time, 'perf_counter', lambda: next(times))
    speed = sample.Speed()
    assert str(speed) == 'prompt: 0 tokens; new: 0 tokens'
    for prompt, steps in ((3000, (3, 3, 1)), (1000, (1, 1))):
        speed.begin(prompt)
        for tokens in steps:
            speed.step(tokens)
    # 4,000 in 0.5 + 0.5 s; of 9 tokens 4 come before the first step ends, 5 in 0.1 + 0.1 + 0.2 s.
    assert str(speed) == 'prompt: 4,000 tokens, 4,000.0 tokens/s; new: 9 tokens, 12.5 tokens/s'


def test_what_is_said_of_a_run_is_counted(written):
    _, _, tail = written(batch_size=2, num_samples=3, max_new_tokens=20)
    counted = re.fullmatch(
        r'prompt: 9 tokens, [\d,.]+ tokens/s; new: 60 tokens, [\d,.]+ tokens/s\n', tail
    )
    assert counted, tail
    _, _, tail = written(start='abc' * 20)  # the context is 16 tokens
    assert tail.startswith('prompt: 48 tokens, ')


def test_a_checkpoint_that_does_not_tell_its_tokenizer_needs_the_dataset(trained, tmp_path):
    folder = tmp_path / 'old'
    shutil.copytree(trained / 'plain', folder)
    (path,) = folder.glob('run_*/checkpoints/iter_*/index.json')
    index = json.loads(path.read_text())
    del index['data']
    index['sha256'] = checkpointing.index_sha256(index)
    path.write_text(json.dumps(index))
    checkpoint = checkpointing.read_index(path.parent)
    with pytest.raises(UserError, match='plain_data') as refused:
        resumption.vocabulary_of(checkpoint)
    assert 'did not tell their tokenizer' in str(refused.value)
    dataset = write_dataset(tmp_path / 'data')
    checkpoint.index['config']['dataset'] = str(dataset)
    codec, vocab_size = resumption.vocabulary_of(checkpoint)
    assert vocab_size == len(LETTERS) and codec.decode([6, 7]) == 'é😀'


def test_the_file_of_a_tokenizer_is_kept_with_the_run(tmp_path):
    tokenizer, data = {'kind': 'bpe', 'file': 'tokenizer.json'}, tmp_path / 'data'
    dataset = SimpleNamespace(tokenizer=tokenizer, folder=data)
    resumption.keep_tokenizer(dataset, tmp_path)  # which is not there: nothing happens
    data.mkdir()
    (data / 'tokenizer.json').write_text('{}')
    resumption.keep_tokenizer(dataset, tmp_path)
    assert (tmp_path / 'tokenizer.json').read_text() == '{}'
