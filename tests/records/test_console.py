"""The console of a run: blocks, nanoGPT's lines, the display in place, and every figure."""

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
from records.startup_report import startup_report

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


def make_console(stream=None, **options):
    return Console(stream=stream or io.StringIO(), max_iters=MAX_ITERS, **options)


def started_console(startup_info=STARTUP_INFO, stream=None, **options):
    live = make_console(stream, **options)
    report = startup_report({**HEADER, 'startup_info': startup_info}, 'out/run_1')
    live.begin(report, startup_info['hardware'])
    return live


def new_output(live):
    """The console's output since the last call."""
    text = live.stream.getvalue()
    live.stream.seek(0)
    live.stream.truncate()
    return text


# --- while it trains --------------------------------------------------------------------------


def test_iteration_line_matches_nanogpt():
    lines = make_console(style='line')
    lines.iteration(iteration(33))
    line = new_output(lines)
    match = re.match(r'iter (\d+): loss ([\d.]+), time ([\d.]+)ms, mfu (-?[\d.]+)%', line)
    assert match and match.groups() == ('33', '3.2145', '234.00', '32.45')
    assert line.endswith('lr 1.50e-06, tok/s 3,557, mem 15.7GB, grad 2.346, eta n/a\n')
    lines.evaluation(evaluation(34), None)
    assert (
        new_output(lines) == 'step 34: train loss 4.1000, val loss 4.2000, 1.8000 bits per byte\n'
    )
    lines.evaluation(evaluation(35, bits=None), None)
    assert new_output(lines) == 'step 35: train loss 4.1000, val loss 4.2000\n'


def test_iteration_block_has_documented_form():
    blocks = make_console(Utf8Terminal(), style='block')
    blocks.iteration(iteration(5))
    rule = '─' * 80
    assert new_output(blocks) == '\n'.join(
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


def test_missing_mfu_is_explained():
    blocks = started_console(NO_PEAK)
    assert 'unknown (no peak is known for this device' in new_output(blocks)
    blocks.iteration(iteration(5, mfu=None))
    text = new_output(blocks)
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
def test_hfu_and_loss_scale_are_shown_if_present(style, hfu, scale, expected):
    live, entry = make_console(style=style), iteration(5)
    entry['mfu']['hfu_percent'] = hfu
    live.iteration({**entry, 'loss_scale': scale})
    text = new_output(live).lower().replace('hfu:', 'hfu')
    assert re.findall(r'hfu [\d.]+%|scale [\d.]+', text) == expected


def test_aux_metrics_end_iteration_block():
    live = make_console(style='block')
    live.iteration(iteration(5))
    dense = new_output(live)
    readings = {'busiest_expert': 1.23456, 'idle_experts': 0.0, 'router_z_loss': None, 'd': 4e-5}
    live.iteration({**iteration(5), 'readings': readings})
    added = new_output(live).removeprefix(dense.rstrip('\n')).strip().splitlines()
    assert re.split(' [|│] ', added[0])[-2:] == ['Idle Experts=0', 'Router Z Loss=n/a']
    assert 'Busiest Expert=1.235' in added[0] and added[1].strip() == 'D=4e-05'


@pytest.mark.parametrize('style', ['block', 'line'])
def test_diagnostics_follow_evaluation(style):
    live, entry = make_console(style=style), evaluation(10)
    live.evaluation(entry, entry)
    alone = new_output(live)
    live.evaluation({**entry, 'diagnostics': DIAGNOSTICS}, entry)
    text = new_output(live)
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
def test_sample_follows_evaluation_with_escapes_shown(style):
    live, entry = make_console(style=style), evaluation(10)
    live.evaluation(entry, entry)
    alone = new_output(live)
    live.evaluation({**entry, 'sample': SAMPLE}, entry)
    assert new_output(live)[len(alone) :].splitlines() == [
        'Sample (took 812ms)',
        '   | ROMEO:',
        '   | O <b>night</b> & \\x1b[31mday !',
    ]


def test_long_sample_is_cut():
    sample = {**SAMPLE, 'text': 'word ' * 400}
    lines = console.sample_block(sample).splitlines()
    assert len(lines) == 1 + SAMPLE_LINES + 1 and lines[-1] == '   │ …'
    assert max(map(len, lines)) <= 80
    shown_words = ' '.join(line[5:] for line in lines[2:-1]).split()
    assert len(shown_words) > 100 and set(shown_words) == {'word'}
    assert 'not finite' in console.sample_block({**SAMPLE, 'text': None})


def test_empty_diagnostics_take_no_line():
    nothing = {'layers': [], 'update_to_weight': {}, 'val_loss_by_position': []}
    assert console.diagnostics_table(nothing) == ''


def test_diagnostics_name_the_kind_of_each_layer():
    """If layers differ, in the order of the layers, also after a resumption."""
    rows = [
        {'layer': n, 'activation_rms': n + 1.0, 'gradient_norm': None, 'max_attention_logit': 2.0}
        for n in range(3)
    ]
    measured = {'layers': rows, 'update_to_weight': {}, 'val_loss_by_position': []}
    layers = {'letters': ['L', 'L', 'G'], 'kinds': {'L': {}, 'G': {}}}
    blocks = make_console()
    for chosen, expected in ((layers, ['kind', 'L', 'L', 'G']), (None, ['activation', *'123'])):
        blocks.begin('', {'peak_tflops': 1.0}, chosen)
        new_output(blocks)
        blocks.evaluation({**evaluation(10, 4.0), 'diagnostics': measured}, None)
        table = new_output(blocks).splitlines()[-4:]
        assert [line.split()[1] for line in table] == expected


def test_evaluation_block_shows_best():
    blocks, best = make_console(), evaluation(10, 4.0)
    blocks.evaluation(best, best)
    assert 'Best val loss so far: this one' in new_output(blocks)
    blocks.evaluation(evaluation(20, 4.25), best)
    assert 'Best val loss so far: 4.0000 at iter 10' in new_output(blocks)
    blocks.evaluation(evaluation(30, None), None)
    assert 'Best val loss so far: n/a' in new_output(blocks)


def test_eta_uses_pace_since_first_logged_iteration(monkeypatch):
    clock = iter([1000.0, 1030.0, 1060.0, 1061.0])
    lines = make_console(style='line')
    monkeypatch.setattr(console.time, 'monotonic', lambda: next(clock))
    left = []
    for i in (9, 19, 39, 99):
        lines.iteration(iteration(i))
        left.append(new_output(lines).rsplit('eta ', 1)[1].strip())
    # 10 updates in 30 s and 80 to go; 30 in 60 s and 60 to go
    assert left == ['n/a', '0:04:00', '0:02:00', '0:00:00']


def test_eta_starts_over_after_rollback(monkeypatch):
    clock = iter([0.0, 1000.0, 1010.0])
    lines = make_console(style='line')
    monkeypatch.setattr(console.time, 'monotonic', lambda: next(clock))
    lines.iteration(iteration(9))
    lines.rollback(5, 'loss is nan')
    assert 'rollback at iter 5: loss is nan' in new_output(lines)
    lines.iteration(iteration(9))
    lines.iteration(iteration(19))  # 10 updates in 10 s and 80 to go
    assert new_output(lines).endswith('eta 0:01:20\n')


# --- the end --------------------------------------------------------------------------------------


def test_closing_block_shows_results_and_next_command():
    text = closing_block(CLOSED, evaluation(30, 3.5, 1.5), 'out/run_1/record.json')
    for expected in (
        'TRAINING INTERRUPTED after 40 of 100 iterations',
        '3.5000 (iter 30; 1.5000 bits per byte)',
        '409,600 (1.36 epochs), about 223,456 of them distinct',
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


def test_reports_show_share_of_data_seen():
    """Random windows have an expected number of distinct tokens, shown with 'about'."""
    text = ' '.join(new_output(started_console()).split())
    assert '100 iterations = 409,600 tokens = 1.36 epochs' in text
    assert (
        'random windows (with replacement); about 223 K distinct tokens (73.8 %) will be seen'
        in text
    )
    assert 'Documents' not in text
    info = with_data(windows_per_epoch=293, planned_unique_tokens=300_032, train_documents=1234)
    assert 'Documents' not in new_output(started_console(info))
    info['data']['val_documents'] = 56
    text = ' '.join(new_output(started_console(info)).split())
    assert 'each of 293 windows once per epoch, reshuffled and with new offsets' in text
    assert '; 300,032 distinct tokens (99.4 %) will be seen' in text
    assert 'Documents: 1,234 train | 56 validation' in text
    text = closing_block({**CLOSED, 'startup_info': info}, None, 'r')
    assert '409,600 (1.36 epochs), 223,456 of them distinct' in text
    unknown = {**CLOSED['summary'], 'epochs': None, 'unique_tokens': None}
    text = closing_block({**CLOSED, 'summary': unknown}, None, 'r')
    assert re.search('Tokens: +409,600$', text, re.M)


@pytest.mark.parametrize('mfu', [99.9, 100.5])
@pytest.mark.parametrize(
    ('source', 'why'),
    [('measured: 1,024-cubed', 'while the machine was busy'), ('--peak_tflops', '--peak_tflops')],
)
def test_mfu_above_peak_is_explained(mfu, source, why):
    hardware = {**STARTUP_INFO['hardware'], 'peak_source': source}
    info = {**STARTUP_INFO, 'hardware': hardware}
    summary = {**CLOSED['summary'], 'avg_mfu': mfu}
    text = closing_block({**CLOSED, 'startup_info': info, 'summary': summary}, None, 'r')
    assert (why in ' '.join(text.split())) == (mfu > 100)


@pytest.mark.parametrize(
    ('count', 'text'),
    [(999, '1.00 kB'), (3.5e6, '3.50 MB'), (1.5e9, '1.50 GB'), (999e9, '999.00 GB')],
)
def test_reports_show_traffic_and_memory_of_processes(count, text):
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
    assert re.search(
        f'Traffic: +{text} sent per process and iteration$', new_output(started_console(info)), re.M
    )
    closing = closing_block({**CLOSED, 'startup_info': info}, None, 'r')
    footprint = f'weights 1.00 GB, gradients 2.00 MB, optimizer {text}'
    assert re.search(f'Memory per process: +{footprint}$', closing, re.M)
    # One process has no traffic, and before an iteration nothing is known.
    assert 'Traffic' not in new_output(started_console())
    info['parallel']['parameter_bytes'] = None
    assert 'Memory per process' not in closing_block({**CLOSED, 'startup_info': info}, None, 'r')


# --- the stream -----------------------------------------------------------------------------------


@pytest.mark.parametrize('style', ['auto', 'block', 'line'])
@pytest.mark.parametrize('info', [STARTUP_INFO, NO_PEAK], ids=['peak', 'no peak'])
def test_log_file_gets_words_of_terminal_as_plain_text(style, info, monkeypatch):
    monkeypatch.setenv('TERM', 'dumb')
    texts = []
    for stream in (io.StringIO(), Utf8Terminal()):
        live = started_console(info, stream, style=style)
        live.iteration(iteration(5, mfu=None if info is NO_PEAK else 32.45))
        measured = {**evaluation(6, 10.9), 'diagnostics': DIAGNOSTICS}
        live.evaluation(measured, measured)
        live.show(checkpoint_line(checkpoint(6)))
        live.show(event_line('signal', 6, 'SIGTERM'))
        live.show(closing_block(CLOSED, evaluation(6, 10.9), 'out/run_1/record.json'))
        texts.append(stream.getvalue())
    plain, fancy = texts
    assert plain.isascii()
    assert re.findall('[A-Za-z]{2,}', plain) == re.findall('[A-Za-z]{2,}', fancy)
    assert '🚀' in fancy and '├─' in fancy
    if style != 'line':
        assert max(map(len, plain.splitlines())) <= 80


def test_ascii_stream_gets_escapes():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding='ascii', write_through=True)
    make_console(stream).show('Folder: læring')
    assert raw.getvalue() == b'Folder: l\\xe6ring\n'


def test_unknown_log_style_raises_user_error():
    with pytest.raises(UserError, match=r"log_style='lines' .*Did you mean line\?"):
        make_console(style='lines')


def test_final_val_loss_names_its_iteration_where_training_went_on():
    summary = {'final_val_loss': 4.5, 'final_train_loss': 4.0, 'final_iter': 200}
    for iter, text in ((0, '4.5000 (iter 0)'), (200, '4.5000')):
        record = {'summary': summary, 'eval_steps': [{'iter': iter}]}
        assert console._final_losses(record)['Final val loss'] == text
