"""evaluate.py: bits per byte and multiple choice equal an independent computation."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from helpers.in_process import train_here

import evaluate
import interop
from common.errors import UserError, run_script
from data.token_files import Split
from data.tokenizer import Tokenizer
from inference import multiple_choice, scoring

pytestmark = pytest.mark.usefixtures('one_thread')

TEXT = 'The naïve fox jumps.\r\n\r\nOver a “lazy” dog, quick and brown — again and again. ' * 6
BLOCK_SIZE = 32


def run(*arguments, code: int = 0) -> None:
    with pytest.raises(SystemExit) as exit:
        run_script(evaluate.main, [str(a) for a in ('--device=cpu', '--dtype=float32', *arguments)])
    assert exit.value.code == code


@pytest.fixture(scope='module')
def of_bytes(tmp_path_factory, tiny_dataset):
    """The out_dir and the model of a run on bytes."""
    out_dir = tmp_path_factory.mktemp('of_bytes')
    options = {'arch_preset': 'llama', 'max_iters': 30, 'learning_rate': 0.01, 'batch_size': 8}
    trained = train_here(tiny_dataset, out_dir, eval_interval=30, **options)
    return out_dir, trained.session.raw_model.eval()


@pytest.fixture(scope='module')
def of_byte_pairs(tmp_path_factory):
    """The out_dir and the model of a run on GPT-2's tokens, which transformers can load."""
    folder, out_dir = tmp_path_factory.mktemp('pairs'), tmp_path_factory.mktemp('of_byte_pairs')
    tokens = np.array(Tokenizer({'kind': 'gpt2'}).encode(TEXT), np.uint16)
    for split in ('train', 'val'):
        tokens.tofile(folder / f'{split}.bin')
    trained = train_here(folder, out_dir, arch_preset='legacy', n_embd=8, activation='gelu_tanh')
    return out_dir, trained.session.raw_model.eval()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / 'text.txt'
    path.write_bytes(TEXT.encode())
    return path


def results(tmp_path, *arguments) -> dict:
    path = tmp_path / 'results.json'
    run(*arguments, f'--json={path}')
    return json.loads(path.read_text(encoding='utf-8'))


@torch.no_grad()
def nats_one_by_one(model, tokens, stride, context=BLOCK_SIZE) -> list[float]:
    """Compute the loss of each token but the first in a separate forward pass."""
    losses = []
    for i in range(1, len(tokens)):
        # The first window scores all its tokens; each later one scores its last `stride` tokens.
        size = context + 1
        end = size if i < size else min(size + stride * ((i - size) // stride + 1), len(tokens))
        start = max(0, end - context - 1)
        assert i < size or i - start > context - stride
        logits = model(torch.tensor([tokens[start:i]]))[0, -1]
        losses.append(-logits.double().log_softmax(-1)[tokens[i]].item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize('stride', [1, 7, None])
def test_bits_per_byte_matches_pass_per_token(of_bytes, text, tmp_path, stride):
    out_dir, model = of_bytes
    options = [f'--stride={stride}', '--batch_size=3'] if stride else []
    (result,) = results(tmp_path, f'--out_dir={out_dir}', f'--text={text}', *options)['text']
    tokens = list(TEXT.encode())
    nats = nats_one_by_one(model, tokens, stride or BLOCK_SIZE // 2)
    assert result['nats'] == pytest.approx(sum(nats), rel=1e-6)
    assert result['tokens'] == result['bytes'] == len(tokens) - 1
    assert result['bits_per_byte'] == pytest.approx(np.mean(nats) / math.log(2), rel=1e-6)
    assert result['perplexity'] == pytest.approx(math.exp(np.mean(nats)), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('context', [2 * BLOCK_SIZE + 3, 5])
def test_bits_per_byte_of_another_context(of_bytes, text, tmp_path, context):
    """Also longer than in training."""
    out_dir, model = of_bytes
    options = [f'--out_dir={out_dir}', f'--text={text}', f'--context={context}']
    scores = results(tmp_path, *options)
    nats = nats_one_by_one(model, list(TEXT.encode()), context // 2, context)
    assert scores['text'][0]['nats'] == pytest.approx(sum(nats), rel=1e-6)
    assert (scores['context'], scores['stride']) == (context, context // 2)


@pytest.mark.slow
def test_context_beyond_the_positions_is_refused(of_byte_pairs, text, tmp_path, capsys):
    run(f'--out_dir={of_byte_pairs[0]}', f'--text={text}', '--context=99', code=2)
    assert '--context=99' in capsys.readouterr().err


@pytest.mark.slow
def test_bits_per_byte_matches_transformers(of_byte_pairs, text, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    out_dir, model = of_byte_pairs
    interop.export(model.config, dict(model.named_parameters()), tmp_path / 'theirs')
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / 'theirs').eval()
    tokenizer = Tokenizer({'kind': 'gpt2'})
    tokens = tokenizer.encode(TEXT)
    size = len(TEXT.encode()) - len(tokenizer.decode(tokens[:1]).encode())
    nats = nats_one_by_one(lambda inputs: theirs(inputs).logits, tokens, 5)
    (result,) = results(tmp_path, f'--out_dir={out_dir}', f'--text={text}', '--stride=5')['text']
    assert result['bytes'] == size and result['tokens'] == len(tokens) - 1 < size
    bits = sum(nats) / math.log(2) / size
    assert result['bits_per_byte'] == pytest.approx(bits, rel=1e-6)
    assert f'{bits:.4f}' in capsys.readouterr().out


def test_bits_per_byte_interval():
    bits = [3.0, 5.0, 4.0, 7.0]
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(bits), scipy.stats.sem(bits))
    assert 10 * scoring.half_interval(bits, [10] * 4) == pytest.approx((high - low) / 2)
    assert scoring.half_interval(bits[:1], [10]) is None

    drawn, covered = np.random.default_rng(0), 0
    for _ in range(400):
        sizes = drawn.integers(10, 40, size=30)
        amounts = sizes * drawn.normal(2.0, 0.5, size=30)
        half = scoring.half_interval(amounts.tolist(), sizes.tolist())
        covered += abs(amounts.sum() / sizes.sum() - 2.0) < half
    assert 0.91 < covered / 400 < 0.98


ITEMS = [
    {'context': 'the quick brown', 'choices': [' fox', ' cat sat on a mat', 'x'], 'answer': 0},
    {'context': 'over a ', 'choices': ['lazy', 'zzzzzzzzzzzz'], 'answer': 1},
    {
        'context': 'jumps ' * 20,
        'choices': ['over a lazy dog.\n', 'the', ' naïve', 'q'],
        'answer': 2,
    },
    {'context': 'naïve', 'choices': [' dog.\n', ' dog.\n the quick'], 'answer': 1},
]


def written(path, items):
    path.write_text('\n'.join(json.dumps(item) for item in items) + '\n\n', encoding='utf-8')
    return path


@torch.no_grad()
def log_likelihood(model, tokenizer, context: str, choice: str) -> float:
    """The sum over the tokens of the choice, with as much of the context as fits."""
    before, tokens = tokenizer.encode(context.rstrip()), tokenizer.encode(context + choice)
    window = tokens[-BLOCK_SIZE - 1 :]
    logits = model(torch.tensor([window[:-1]]))[0].double().log_softmax(-1)
    first = len(window) - (len(tokens) - len(before))
    return sum(logits[i - 1, window[i]].item() for i in range(first, len(window)))


@pytest.mark.parametrize('kind', ['byte', 'gpt2'])
def test_choices_match_brute_force(of_bytes, of_byte_pairs, tmp_path, kind, capsys):
    out_dir, model = of_bytes if kind == 'byte' else of_byte_pairs
    tokenizer, items = Tokenizer({'kind': kind}), ITEMS
    if kind == 'gpt2':  # its end-of-text token is the context if there is none
        items = [*ITEMS, {'context': '', 'choices': ['The fox', ' jumps'], 'answer': 0}]
    path = written(tmp_path / 'items.jsonl', items)
    (result,) = results(tmp_path, f'--out_dir={out_dir}', f'--choices={path}')['choices']
    right, right_norm, right_bytes = [], [], []
    for item, item_result in zip(items, result['each'], strict=True):
        context = item['context'] or '<|endoftext|>'
        choices = item['choices']
        if item['context']:
            values = [log_likelihood(model, tokenizer, context, choice) for choice in choices]
        else:
            values = []
            for choice in choices:
                tokens = torch.tensor([[50256, *tokenizer.encode(choice)]])
                with torch.no_grad():
                    logits = model(tokens[:, :-1])[0].double().log_softmax(-1)
                values.append(logits.gather(1, tokens[0, 1:, None]).sum().item())
        assert item_result['log_likelihoods'] == pytest.approx(values, rel=1e-5)
        assert item_result['bytes'] == [len(choice.encode()) for choice in choices]
        assert item_result['characters'] == [len(choice) for choice in choices]
        # lm-evaluation-harness divides by float(len(i)) and float(len(i.encode('utf-8'))).
        by_character = [value / len(choice) for value, choice in zip(values, choices)]
        by_byte = [value / len(choice.encode()) for value, choice in zip(values, choices)]
        right.append(np.argmax(values) == item['answer'])
        right_norm.append(np.argmax(by_character) == item['answer'])
        right_bytes.append(np.argmax(by_byte) == item['answer'])
    assert right != right_norm  # otherwise the items would test nothing
    for key, values in (('acc', right), ('acc_norm', right_norm), ('acc_bytes', right_bytes)):
        assert result[key] == pytest.approx(np.mean(values))
        assert result[f'{key}_stderr'] == pytest.approx(scipy.stats.sem(values))
    assert result['items'] == len(items)
    assert result['chance'] == pytest.approx(np.mean([1 / len(i['choices']) for i in items]))
    header, row = capsys.readouterr().out.splitlines()[-2:]
    shown = dict(zip(header.replace('± error', '±').split(), row.split()))
    assert {key: shown[key] for key in ('acc', 'acc_norm', 'acc_bytes')} == {
        'acc': f'{np.mean(right):.4f}',
        'acc_norm': f'{np.mean(right_norm):.4f}',
        'acc_bytes': f'{np.mean(right_bytes):.4f}',
    }


def test_characters_and_bytes_rank_choices_differently():
    """With letters of several bytes, likelihood per byte exceeds likelihood per character."""
    result = {'log_likelihoods': [-6.0, -7.0], 'characters': [3, 4], 'bytes': [12, 4]}
    assert scoring.likeliest(result, None) == 0
    assert scoring.likeliest(result, 'characters') == 1
    assert scoring.likeliest(result, 'bytes') == 0


def test_results_are_written_before_shown(of_bytes, text, tmp_path, monkeypatch):
    path = tmp_path / 'results.json'

    def broken(*_, **__):
        assert json.loads(path.read_text())['text'][0]['tokens']
        raise BrokenPipeError

    monkeypatch.setattr(evaluate, 'write_text', broken)
    with pytest.raises(BrokenPipeError):
        evaluate.main([f'--out_dir={of_bytes[0]}', f'--text={text}', f'--json={path}'])
    assert path.exists()


def test_results_that_cannot_be_written_are_shown(of_bytes, text, tmp_path, monkeypatch, capsys):
    def full(path, results):
        raise UserError('--json: no space left')

    monkeypatch.setattr(evaluate, 'write_json', full)
    run(f'--out_dir={of_bytes[0]}', f'--text={text}', f'--json={tmp_path}/a.json', code=2)
    shown = capsys.readouterr()
    assert 'bits/byte' in shown.out and 'no space left' in shown.err


def test_nonfinite_likelihoods_give_no_result(of_bytes, text, monkeypatch, capsys):
    monkeypatch.setattr(scoring.Scorer, '_batch', lambda *_: [math.nan] * 99)
    run(f'--out_dir={of_bytes[0]}', f'--text={text}', code=2)
    assert 'is not finite' in capsys.readouterr().err
    assert scoring.perplexity(1e6) is None and scoring.perplexity(0) == 1


def test_item_lines_end_at_line_feeds_only(of_bytes, tmp_path):
    """A byte order mark, carriage returns and separators within a text change nothing."""
    item = {'context': 'the\u2028quick\x85brown', 'choices': [' fox\u2029', ' dog'], 'answer': 0}
    plain = json.dumps(item).encode() + b'\n'
    as_is = json.dumps(item, ensure_ascii=False).encode() + b'\n'
    forms = {
        'plain': plain * 2,
        'raw': as_is * 2,
        'windows': b'\xef\xbb\xbf' + plain[:-1] + b'\r\n' + as_is,
    }
    each = []
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        (result,) = results(tmp_path, f'--out_dir={of_bytes[0]}', f'--choices={tmp_path / name}')[
            'choices'
        ]
        each.append(result['each'])
    assert each[0] == each[1] == each[2] and [e['line'] for e in each[0]] == [1, 2]


def test_lone_surrogate_is_replaced(of_bytes, tmp_path):
    for name, half in (('half', '\\ud83d'), ('replaced', '\ufffd')):
        line = f'{{"context": "a b{half}", "choices": [" c{half}", " d"], "answer": 0}}\n'
        (tmp_path / name).write_text(line, encoding='utf-8')
    half, replaced = results(
        tmp_path,
        f'--out_dir={of_bytes[0]}',
        *(f'--choices={tmp_path / n}' for n in ('half', 'replaced')),
    )['choices']
    assert half['each'] == replaced['each'] and half['each'][0]['bytes'][0] == 5


def test_items_from_validation_text(of_bytes, tmp_path, tiny_dataset):
    out_dir, _ = of_bytes
    paths = [tmp_path / 'one.jsonl', tmp_path / 'two.jsonl']
    made = results(tmp_path, f'--out_dir={out_dir}', f'--make_choices={paths[0]}', '--num_items=40')
    again = results(tmp_path, f'--out_dir={out_dir}', f'--choices={paths[0]}', '--batch_size=5')
    (made,), (again,) = made['choices'], again['choices']
    for one, two in zip(made['each'], again['each'], strict=True):
        assert one['log_likelihoods'] == pytest.approx(two['log_likelihoods'], rel=1e-5)
    run(f'--out_dir={out_dir}', f'--make_choices={paths[1]}', '--num_items=40')
    assert paths[0].read_bytes() == paths[1].read_bytes()

    text = (tiny_dataset / 'val.bin').read_bytes().decode(errors='replace')
    items = [json.loads(line) for line in paths[0].read_text(encoding='utf-8').splitlines()]
    assert len(items) == 40 and {item['answer'] for item in items} == {0, 1, 2, 3}
    for item in items:
        assert len(set(item['choices'])) == 4 and all(choice in text for choice in item['choices'])
        followers = [item['context'] + choice in text for choice in item['choices']]
        assert followers == [number == item['answer'] for number in range(4)]


def test_items_stay_within_documents(of_bytes, tmp_path, monkeypatch):
    """The dataset marks the ends of documents."""
    tokenizer = Tokenizer({'kind': 'byte', 'end_of_text': True})
    documents = [tokenizer.encode(f'{name * 9} ' * 40) for name in 'abcde']
    tokens = np.concatenate([[*document, tokenizer.end_of_text] for document in documents])
    split = tmp_path / 'val'
    tokens.astype('<u2').tofile(split)
    facts = {'shards': [{'file': split.name, 'tokens': len(tokens)}]}
    dataset = SimpleNamespace(
        splits={'val': Split(tmp_path, facts, 'uint16')},
        end_of_text=256,
        block_size=BLOCK_SIZE,
        folder=tmp_path,
        verify_checksums=lambda splits: None,
    )
    monkeypatch.setattr(evaluate, 'load_dataset', lambda name, block_size: dataset)
    path = tmp_path / 'items.jsonl'
    monkeypatch.setattr(evaluate, 'load_tokenizer', lambda checkpoint: (tokenizer, 257))
    run(f'--out_dir={of_bytes[0]}', f'--make_choices={path}', '--num_items=50')
    for item in map(json.loads, path.read_text().splitlines()):
        letters = {*item['context'], *item['choices'][item['answer']]} - {' '}
        assert len(letters) == 1 and letters < set('abcde')
    assert multiple_choice.items_from_documents(['too short ' * 20], 5) == []


MISTAKES = {
    '': ['nothing to evaluate', '--text=FILE'],
    '--text=nothing.txt': ['--text=nothing.txt', 'No such file'],
    '--text=latin.txt': ['latin.txt', 'UTF-8'],
    '--text=empty.txt': ['empty.txt has 0 token(s)'],
    '--text=.': ['--text=. cannot be read: Is a directory'],
    '--choices=.': ['--choices=. cannot be read: Is a directory'],
    '--choices=latin.txt': ['--choices=latin.txt, line 1: not JSON'],
    '--text=utf16.txt': ['utf16.txt is not UTF-8 text but UTF-16', 'iconv'],
    '--choices=odd.jsonl': [f'line {n}: ' for n in range(1, 6)],
    '--choices=wide.jsonl': ['line 1: its choice', '300000 tokens'],
    '--choices=deep.jsonl': ['line 1: not JSON: nested too deeply'],
    '--text=text.txt --json=.': ['--json=. is a folder'],
    '--text=text.txt --json=text.txt': ['--json=text.txt would overwrite'],
    '--choices=bad.jsonl': [
        'line 1: not JSON',
        'line 2: an item must be',
        'line 3: an item must be',
    ],
    '--choices=empty.txt': ['contains no items'],
    '--choices=long.jsonl': ['line 1', '33 tokens', 'block_size=32'],
    '--choices=bare.jsonl': ['line 1: its context is empty'],
    '--text=text.txt --stride=33': ['--stride=33', 'block_size=32'],
    '--text=text.txt --context=8 --stride=9': ['--stride=9', '--context=8'],
    '--text=text.txt --batch_size=0': ['--batch_size=0'],
    '--text=text.txt --json=nowhere/a.json': ['the folder nowhere does not exist'],
    '--make_choices=empty.txt': ['empty.txt already exists', '--choices=empty.txt'],
    '--make_choices=many.jsonl --num_items=99999': ['--num_items='],
    '--txt=text.txt': ['--txt', 'Did you mean --text'],
    '--text=text.txt --out_dir=none': ['none', 'no run'],
}


@pytest.mark.parametrize('arguments', MISTAKES)
def test_mistakes_are_reported(of_bytes, text, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'latin.txt').write_bytes('naïve'.encode('latin-1'))
    (tmp_path / 'empty.txt').touch()
    (tmp_path / 'bad.jsonl').write_text('{\n[]\n{"context": "a", "choices": ["b"], "answer": 0}\n')
    (tmp_path / 'utf16.txt').write_bytes('text'.encode('utf-16'))
    odd = [{'answer': a} for a in (None, '0', 1.0, True, 2)]
    fine = {'context': 'a', 'choices': ['b', 'c']}
    written(tmp_path / 'odd.jsonl', [fine | answer for answer in odd])
    written(tmp_path / 'wide.jsonl', [fine | {'choices': ['b', 'c' * 300_000], 'answer': 0}])
    (tmp_path / 'deep.jsonl').write_text('[' * 200_000 + '\n')
    written(tmp_path / 'long.jsonl', [{'context': 'a', 'choices': ['b', 'b' * 33], 'answer': 0}])
    written(tmp_path / 'bare.jsonl', [{'context': '', 'choices': ['b', 'c'], 'answer': 0}])
    run(f'--out_dir={of_bytes[0]}', *arguments.split(), code=2)
    error = capsys.readouterr().err
    assert all(word in error for word in MISTAKES[arguments]), error
    assert 'Traceback' not in error and not (tmp_path / 'many.jsonl').exists()


def test_characters_missing_from_vocabulary(tmp_path, monkeypatch, of_bytes, text, capsys):
    tokenizer = Tokenizer({'kind': 'char', 'characters': ['a', 'b']})
    monkeypatch.setattr(evaluate, 'load_tokenizer', lambda checkpoint: (tokenizer, 2))
    path = written(tmp_path / 'i.jsonl', [{'context': 'a', 'choices': ['b', 'é'], 'answer': 0}])
    for key, file in (('text', text), ('choices', path)):
        run(f'--out_dir={of_bytes[0]}', f'--{key}={file}', code=2)
        error = capsys.readouterr().err
        assert f'--{key}={file}' in error and 'vocabulary of 2 characters does not have' in error


@pytest.mark.slow
def test_evaluate_help(run_script):
    assert '--make_choices' in run_script('evaluate.py', '--help').stdout
