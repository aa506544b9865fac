"""What a run shows: the design document's forms, nanoGPT's, and every figure where it belongs."""

import io
import re

import pytest
from helpers.sample_run import (
    DIAGNOSTICS,
    HEADER,
    MAX_ITERS,
    NO_PEAK,
    SAMPLE,
    STARTUP_INFO,
    Utf8Terminal,
    checkpoint,
    evaluation,
    iteration,
)

from common.errors import UserError
from common.formatting import SAMPLE_LINES
from records import console
from records.console import Console, checkpoint_line, closing_block, event_line
from records.startup_report import resume_report, startup_report

CLOSED = {
    'status': 'interrupted',
    'checkpoints': [checkpoint(100)],
    'startup_info': STARTUP_INFO,
    'summary': {
        'total_iterations': 100,
        'final_iter': 40,
        'final_train_loss': 3.25,
        'best_val_loss': 3.5,
        'final_val_loss': 3.75,
        'val_bits_per_byte': 1.5,
        'avg_mfu': 31.5,
        'avg_time_ms': 234.0,
        'total_tokens': 409_600,
        'epochs': 1.3564,
        'unique_tokens': 223_456,
        'total_flops': 350.1e12,
        'wall_seconds': 3723.4,
        'peak_memory_gb': 30.0,
    },
}


def console_on(stream=None, **options):
    return Console(stream=stream or io.StringIO(), max_iters=MAX_ITERS, **options)


def begun(startup_info=STARTUP_INFO, stream=None, **options):
    shown_on = console_on(stream, **options)
    report = startup_report({**HEADER, 'startup_info': startup_info}, 'out/run_1')
    shown_on.begin(report, startup_info['hardware'])
    return shown_on


def shown(shown_on):
    """What the console has shown since last asked."""
    text = shown_on.stream.getvalue()
    shown_on.stream.seek(0)
    shown_on.stream.truncate()
    return text


# --- as it goes -----------------------------------------------------------------------------------


def test_a_line_an_iteration_reads_like_nanogpt():
    lines = console_on(style='line')
    lines.iteration(iteration(33))
    line = shown(lines)
    match = re.match(r'iter (\d+): loss ([\d.]+), time ([\d.]+)ms, mfu (-?[\d.]+)%', line)
    assert match and match.groups() == ('33', '3.2145', '234.00', '32.45')
    assert line.endswith('lr 1.50e-06, tok/s 3,557, mem 15.7GB, grad 2.346, eta n/a\n')
    lines.evaluation(evaluation(34), None)
    assert shown(lines) == 'step 34: train loss 4.1000, val loss 4.2000, 1.8000 bits per byte\n'
    lines.evaluation(evaluation(35, bits=None), None)
    assert shown(lines) == 'step 35: train loss 4.1000, val loss 4.2000\n'


def test_the_block_of_an_iteration_is_the_design_documents():
    blocks = console_on(Utf8Terminal())
    blocks.iteration(iteration(5))
    rule = '─' * 80
    assert shown(blocks) == '\n'.join(
        [
            rule,
            '📍 Iter      5 │ Loss: 3.2145 │ Time: 234ms │ LR: 1.50e-06 │ ETA: n/a',
            rule,
            '⚡ MFU: 32.45% (causal 30.31%) │ Achieved: 101.2 TF │ Peak: 312.0 TF',
            '   Tokens/s: 3,557 │ FLOPs/token: 854.7 MF',
            '💾 Memory: 12.34 GB alloc │ 15.67 GB peak │ 16.00 GB reserved',
            '📊 Gradients: norm=2.3456 │ mean=-1.23e-05 │ std=3.45e-04',
            '',
        ]
    )


def test_a_missing_mfu_comes_with_the_reason():
    blocks = begun(NO_PEAK)
    assert 'unknown (no peak is known for this device' in shown(blocks)
    blocks.iteration(iteration(5, mfu=None))
    text = shown(blocks)
    assert 'MFU: n/a (no peak is known for this device; --peak_tflops gives one)' in text
    assert 'Peak:' not in text


@pytest.mark.parametrize('style', ['block', 'line'])
@pytest.mark.parametrize(
    'hfu, scale, expected',
    [
        (32.4512, None, []),  # reads like the MFU
        (43.25, 65536.0, ['hfu 43.25%', 'scale 65536']),
        (32.45, 2.0**24, ['scale 16777216']),
        (None, 0.5, ['scale 0.5']),
    ],
)
def test_recomputation_and_loss_scale_are_shown_where_there_are_any(style, hfu, scale, expected):
    shown_on, entry = console_on(style=style), iteration(5)
    entry['mfu']['hfu_percent'] = hfu
    shown_on.iteration({**entry, 'loss_scale': scale})
    text = shown(shown_on).lower().replace('hfu:', 'hfu')
    assert re.findall(r'hfu [\d.]+%|scale [\d.]+', text) == expected


def test_what_components_report_ends_the_block():
    shown_on = console_on(style='block')
    shown_on.iteration(iteration(5))
    dense = shown(shown_on)
    readings = {'busiest_expert': 1.23456, 'idle_experts': 0.0, 'router_z_loss': None, 'd': 4e-5}
    shown_on.iteration({**iteration(5), 'readings': readings})
    added = shown(shown_on).removeprefix(dense.rstrip('\n')).strip().splitlines()
    assert re.split(' [|│] ', added[0])[-2:] == ['Idle Experts=0', 'Router Z Loss=n/a']
    assert 'Busiest Expert=1.235' in added[0] and added[1].strip() == 'D=4e-05'


@pytest.mark.parametrize('style', ['block', 'line'])
def test_diagnostics_follow_the_evaluation(style):
    shown_on, entry = console_on(style=style), evaluation(10)
    shown_on.evaluation(entry, entry)
    alone = shown(shown_on)
    shown_on.evaluation({**entry, 'diagnostics': DIAGNOSTICS}, entry)
    text = shown(shown_on)
    assert text.startswith(alone)
    table = text[len(alone) :].splitlines()
    assert all(line.startswith('  ') and len(line) <= 80 for line in table)
    assert [line.split() for line in table[1:3]] == [
        ['0', '1.02', '0.0123', '4.5'],
        ['1', '14.7', 'n/a', '123'],
    ]
    assert table[3].split(maxsplit=1) == [
        'Update/weight:',
        'matrices 1.2e-03 | gains and biases n/a',
    ]
    losses = ' '.join(table[4:])
    spans = re.findall(r'(\d+)(?:-(\d+))?=([\d.]+)', losses)
    covered = [n for a, b, _ in spans for n in range(int(a), int(b or a) + 1)]
    assert covered == list(range(1024))
    assert [float(loss) for *_, loss in spans] == [
        span['loss'] for span in DIAGNOSTICS['val_loss_by_position']
    ]


@pytest.mark.parametrize('style', ['block', 'line'])
def test_a_sample_follows_the_evaluation_and_cannot_touch_the_terminal(style):
    shown_on, entry = console_on(style=style), evaluation(10)
    shown_on.evaluation(entry, entry)
    alone = shown(shown_on)
    shown_on.evaluation({**entry, 'sample': SAMPLE}, entry)
    assert shown(shown_on)[len(alone) :].splitlines() == [
        'Sample (took 812ms)',
        '   | ROMEO:',
        '   | O <b>night</b> & \\x1b[31mday !',
    ]


def test_the_first_lines_of_a_sample_are_shown():
    sample = {**SAMPLE, 'text': 'word ' * 400}
    lines = console.sample_block(sample).splitlines()
    assert len(lines) == 1 + SAMPLE_LINES + 1 and lines[-1] == '   │ …'
    assert max(map(len, lines)) <= 80
    shown_words = ' '.join(line[5:] for line in lines[2:-1]).split()
    assert len(shown_words) > 100 and set(shown_words) == {'word'}
    assert 'not finite' in console.sample_block({**SAMPLE, 'text': None})


def test_diagnostics_that_hold_nothing_take_no_line():
    nothing = {'layers': [], 'update_to_weight': {}, 'val_loss_by_position': []}
    assert console.diagnostics_table(nothing) == ''


def test_an_evaluation_is_shown_beside_the_best():
    blocks, best = console_on(), evaluation(10, 4.0)
    blocks.evaluation(best, best)
    assert 'Best val loss so far: this one' in shown(blocks)
    blocks.evaluation(evaluation(20, 4.25), best)
    assert 'Best val loss so far: 4.0000 at iter 10' in shown(blocks)
    blocks.evaluation(evaluation(30, None), None)
    assert 'Best val loss so far: n/a' in shown(blocks)


def test_time_left_is_the_pace_since_the_first_logged_step(monkeypatch):
    clock = iter([1000.0, 1030.0, 1060.0, 1061.0])
    lines = console_on(style='line')
    monkeypatch.setattr(console.time, 'monotonic', lambda: next(clock))
    left = []
    for i in (9, 19, 39, 99):
        lines.iteration(iteration(i))
        left.append(shown(lines).rsplit('eta ', 1)[1].strip())
    # 10 updates in 30 s and 80 to go; 30 in 60 s and 60 to go
    assert left == ['n/a', '0:04:00', '0:02:00', '0:00:00']


def test_the_pace_begins_anew_after_a_rollback(monkeypatch):
    clock = iter([0.0, 1000.0, 1010.0])
    lines = console_on(style='line')
    monkeypatch.setattr(console.time, 'monotonic', lambda: next(clock))
    lines.iteration(iteration(9))
    lines.rollback(5, 'loss is nan')
    assert 'rollback at iter 5: loss is nan' in shown(lines)
    lines.iteration(iteration(9))
    lines.iteration(iteration(19))  # 10 updates in 10 s and 80 to go
    assert shown(lines).endswith('eta 0:01:20\n')


# --- the start ------------------------------------------------------------------------------------


def test_the_startup_report_shows_every_choice_and_figures_that_add_up():
    report = shown(begun())
    for key, value in {
        'Architecture Name': '12L-12H-768D-RoPE-RMS-SwiGLU-PreNorm',
        'Layers': '12',
        'Normalization': 'rmsnorm',
        'Position Encoding': 'rope',
        'RoPE Theta': '10000.0',
        'Use GQA': 'False',
        'FFN Type': 'swiglu',
        'Tokens/iteration': '1 sequence x 4 accumulation x 1,024 tokens = 4,096',
        'Vocabulary': '50,257 data -> 50,304 model',
        'Attention/FFN ratio': '0.67 (causal)',
        'Expected tokens/s': '182,516 at 50 % MFU',
        'Peak': '312.0 TFLOP/s (NVIDIA A100 datasheet, dense bfloat16)',
        'warmup_iters': '5: 5 % of max_iters',
        'Element-wise': '1,234,567 values written per token, forward; not in MFU',
        'Folder': 'out/run_1',
    }.items():
        assert re.search(rf'{re.escape(key)}: +{re.escape(value)}$', report, re.MULTILINE), key
    totals = re.findall(r'^ +total +(.*)$', report, re.MULTILINE)
    assert [total.split() for total in totals] == [
        ['162,220,800', '100.0', '%'],
        ['111', '162,220,800'],
        ['854.7', 'MF', '100.0', '%', '798.0', 'MF', '100.0', '%'],
    ]


@pytest.mark.parametrize(
    'setting, text',
    [('none', None), ('full', 'every block'), (3, 'one block in 3')],
)
def test_recomputation_is_reported_where_there_is_any(setting, text):
    info = {
        **STARTUP_INFO,
        'hardware': {**STARTUP_INFO['hardware'], 'activation_checkpointing': setting},
        'flops': {**STARTUP_INFO['flops'], 'recomputed_per_token': 2.5e8 if text else 0.0},
    }
    lines = re.findall(r'^  (Recomput.*?): +(.*)$', shown(begun(info)), re.MULTILINE)
    assert (
        lines
        == [
            ('Recomputation', f'{text} (activation_checkpointing={setting})'),
            ('Recomputed', '250.0 MFLOPs per token (in HFU, not in MFU)'),
        ][: 2 if text else 0]
    )


@pytest.mark.parametrize('part, key', [('model', 'total_params'), ('flops', 'per_token')])
def test_tables_that_do_not_add_up_are_refused(part, key):
    figures = STARTUP_INFO[part]
    with pytest.raises(AssertionError):
        begun({**STARTUP_INFO, part: {**figures, key: figures[key] + 1000}})


def test_the_optimizer_must_hold_every_parameter():
    optimizer = STARTUP_INFO['optimizer']
    with pytest.raises(AssertionError):
        begun({**STARTUP_INFO, 'optimizer': {**optimizer, 'groups': optimizer['groups'][:1]}})


def test_a_resumed_run_warns_of_what_changed():
    changed = {
        'gradient_accumulation_steps': [4, 8],
        'versions.torch': ['2.12.0', '2.13.0'],
        'git_commit': ['0123456789' * 4, 'abcdef0123' * 4],
        'peak_tflops': [None, 0.5],
    }
    same, different = console_on(), console_on()
    for shown_on, differences in ((same, {}), (different, changed)):
        report = resume_report(1500, 'checkpoints/1500', differences, 'out/run_1')
        shown_on.begin(report, STARTUP_INFO['hardware'])
    text = shown(different)
    assert re.search('RESUMED from checkpoints/1500 at iteration 1,500$', text, re.MULTILINE)
    assert re.search('Folder: +out/run_1$', text, re.MULTILINE)
    assert 'may differ' in text and 'may differ' not in shown(same)
    for key, (old, new) in changed.items():
        assert re.search(rf'{key}: +{old} ->\W+{new}$', text, re.MULTILINE), key
    assert max(map(len, text.splitlines())) <= 80


# --- the end --------------------------------------------------------------------------------------


def test_the_closing_block_says_where_and_what_next():
    text = closing_block(CLOSED, evaluation(30, 3.5, 1.5), 'out/run_1/record.json')
    for expected in (
        'TRAINING INTERRUPTED after 40 of 100 iterations',
        '3.5000 (iter 30; 1.5000 bits per byte)',
        '409,600 (1.36 epochs), about 223,456 different ones',
        '350.1 TFLOPs',
        '1:02:03',
        'out/run_1/record.json',
        'python compare_architectures.py',
        '--init_from=resume',
    ):
        assert expected in text
    assert '--init_from' not in closing_block({**CLOSED, 'status': 'finished'}, None, 'r')
    assert '--init_from' not in closing_block({**CLOSED, 'checkpoints': []}, None, 'r')


def with_data(**values):
    return {**STARTUP_INFO, 'data': {**STARTUP_INFO['data'], **values}}


def test_how_much_of_the_data_a_run_meets():
    """At random it is an expectation, and says about; after another order nothing is known."""
    text = ' '.join(shown(begun()).split())
    assert '100 iterations = 409,600 tokens = 1.36 epochs' in text
    assert 'the run meets about 223,000 of the tokens (73.8 %)' in text and 'Documents' not in text
    info = with_data(windows_per_epoch=293, planned_unique_tokens=300_032, train_documents=1234)
    assert 'Documents' not in shown(begun(info))
    info['data']['val_documents'] = 56
    text = ' '.join(shown(begun(info)).split())
    assert 'each of 293 windows once an epoch, shuffled and cut anew in each' in text
    assert 'the run meets 300,032 of the tokens (99.4 %)' in text
    assert 'Documents: 1,234 train | 56 validation' in text
    text = closing_block({**CLOSED, 'startup_info': info}, None, 'r')
    assert '409,600 (1.36 epochs), 223,456 different ones' in text
    unknown = {**CLOSED['summary'], 'epochs': None, 'unique_tokens': None}
    text = closing_block({**CLOSED, 'summary': unknown}, None, 'r')
    assert re.search('Tokens: +409,600$', text, re.M)


@pytest.mark.parametrize('mfu', [99.9, 100.5])
@pytest.mark.parametrize(
    ('source', 'why'),
    [('measured: 1,024-cubed', 'while the machine was busy'), ('--peak_tflops', '--peak_tflops')],
)
def test_more_than_the_peak_is_explained(mfu, source, why):
    hardware = {**STARTUP_INFO['hardware'], 'peak_source': source}
    info = {**STARTUP_INFO, 'hardware': hardware}
    summary = {**CLOSED['summary'], 'avg_mfu': mfu}
    text = closing_block({**CLOSED, 'startup_info': info, 'summary': summary}, None, 'r')
    assert (why in ' '.join(text.split())) == (mfu > 100)


@pytest.mark.parametrize(
    ('count', 'text'),
    [(999, '1.00 kB'), (3.5e6, '3.50 MB'), (1.5e9, '1.50 GB'), (999e9, '999.00 GB')],
)
def test_several_processes_are_told_what_each_sends_and_holds(count, text):
    info = {
        **STARTUP_INFO,
        'hardware': {**STARTUP_INFO['hardware'], 'world_size': 2},
        'parallel': {
            'bytes_sent_per_update': count,
            'parameter_bytes': 1e9,
            'gradient_bytes': 2e6,
            'optimizer_bytes': count,
        },
    }
    assert re.search(f'Traffic: +{text} from each process in an update$', shown(begun(info)), re.M)
    closing = closing_block({**CLOSED, 'startup_info': info}, None, 'r')
    held = f'weights 1.00 GB, gradients 2.00 MB, optimizer {text}'
    assert re.search(f'Each process: +{held}$', closing, re.M)
    # One process has no traffic, and before an update nothing is known.
    assert 'Traffic' not in shown(begun())
    info['parallel']['parameter_bytes'] = None
    assert 'Each process' not in closing_block({**CLOSED, 'startup_info': info}, None, 'r')


# --- the stream -----------------------------------------------------------------------------------


@pytest.mark.parametrize('style', ['auto', 'block', 'line'])
@pytest.mark.parametrize('info', [STARTUP_INFO, NO_PEAK], ids=['peak', 'no peak'])
def test_a_log_file_gets_plain_text_and_80_columns_and_a_terminal_the_same_words(style, info):
    texts = []
    for stream in (io.StringIO(), Utf8Terminal()):
        shown_on = begun(info, stream, style=style)
        shown_on.iteration(iteration(5, mfu=None if info is NO_PEAK else 32.45))
        measured = {**evaluation(6, 10.9), 'diagnostics': DIAGNOSTICS}
        shown_on.evaluation(measured, measured)
        shown_on.show(checkpoint_line(checkpoint(6)))
        shown_on.show(event_line('signal', 6, 'SIGTERM'))
        shown_on.show(closing_block(CLOSED, evaluation(6, 10.9), 'out/run_1/record.json'))
        texts.append(stream.getvalue())
    plain, fancy = texts
    assert plain.isascii()
    assert re.findall('[A-Za-z]{2,}', plain) == re.findall('[A-Za-z]{2,}', fancy)
    assert '🚀' in fancy and '├─' in fancy
    if style != 'line':
        assert max(map(len, plain.splitlines())) <= 80


def test_a_stream_that_lacks_letters_does_not_end_the_run():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding='ascii', write_through=True)
    console_on(stream).show('Folder: læring')
    assert raw.getvalue() == b'Folder: l\\xe6ring\n'


def test_an_unknown_style_is_the_users_mistake():
    with pytest.raises(UserError, match=r"log_style='lines' .*Did you mean line\?"):
        console_on(style='lines')
