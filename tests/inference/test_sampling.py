"""sampling.py: filters equal those of transformers, draws follow probabilities, text streams."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common.errors import UserError
from inference.sampling import Sampler, TextStream

pytestmark = [pytest.mark.optional, pytest.mark.usefixtures('one_thread')]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_logits(rows, vocab_size, seed=0):
    return 3 * torch.randn((rows, vocab_size), generator=seeded(seed))


def transformers_probabilities(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities by transformers' processors, in the order of its `generate`."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    return lambda logits: processors(None, logits).softmax(-1)


def sampler_probabilities(**options):
    """The probabilities from which a Sampler draws."""
    seen = []

    class Seen(Sampler):
        def draw(self, probabilities):
            seen.append(probabilities)
            return super().draw(probabilities)

    def probabilities(logits):
        Seen(logits.size(-1), **options, generator=seeded())(logits)
        return seen[-1].float()

    return probabilities


FILTERS = [
    {},
    {'temperature': 0.7},
    {'temperature': 100.0},
    {'top_k': 1},
    {'top_k': 5},
    {'top_k': 99},
    {'top_p': 0.0},
    {'top_p': 0.05},
    {'top_p': 0.9},
    {'min_p': 0.02},
    {'min_p': 1.0},
    {'temperature': 1.7, 'top_k': 12, 'top_p': 0.8},
    {'top_k': 20, 'top_p': 0.95, 'min_p': 0.1},
    {'temperature': 0.3, 'top_k': 7, 'top_p': 0.6, 'min_p': 0.05},
]


@pytest.mark.parametrize('options', FILTERS, ids=str)
def test_probabilities_equal_transformers(options):
    logits = random_logits(64, 50)
    expected = transformers_probabilities(**options)(logits)
    probabilities = sampler_probabilities(**options)(logits)
    assert torch.equal(probabilities > 0, expected > 0)
    torch.testing.assert_close(probabilities, expected)
    if options not in ({}, {'temperature': 0.7}, {'temperature': 100.0}, {'top_k': 99}):
        assert (expected == 0).any()


@pytest.mark.parametrize('options', [{'top_k': 2}, {'top_p': 0.5}, {'min_p': 0.5}], ids=str)
def test_filters_with_ties_equal_transformers(options):
    """Some logits are equal, and one token is impossible before the filter."""
    logits = torch.tensor([[1.0, 1, 1, 1, 1, 1], [0, 2, 2, 2, -math.inf, 0], [5, 5, 0, 0, 0, 0]])
    expected = transformers_probabilities(**options)(logits)
    probabilities = sampler_probabilities(**options)(logits)
    assert torch.equal(probabilities > 0, expected > 0)
    torch.testing.assert_close(probabilities, expected)


def test_temperature_0_is_argmax():
    logits = random_logits(40, 30)
    for options in ({}, {'top_k': 3, 'top_p': 0.1, 'min_p': 0.9}):
        assert torch.equal(Sampler(30, temperature=0, **options)(logits), logits.argmax(-1))
    assert Sampler(3, temperature=0)(torch.tensor([[0.0, 4, 4]])).tolist() == [1]
    for temperature in (1e-30, 1e-300):
        drawn = Sampler(30, temperature=temperature, generator=seeded())(logits)
        assert torch.equal(drawn, logits.argmax(-1))


@pytest.mark.parametrize(
    'options',
    [{}, {'temperature': 0.5}, {'temperature': 2.0, 'top_k': 3}, {'top_p': 0.7}, {'min_p': 0.2}],
    ids=str,
)
@pytest.mark.parametrize('streams', ['one', 'many'])
def test_draws_follow_probabilities(options, streams):
    number, rows = (40_000, 1) if streams == 'one' else (2_000, 20)
    logits = random_logits(1, 10, seed=3)
    expected = number * transformers_probabilities(**options)(logits)[0].double()
    generator = seeded(1) if streams == 'one' else [seeded(n) for n in range(rows)]
    draws = number if streams == 'one' else number // rows
    sampler = Sampler(10, **options, generator=generator)
    if streams == 'one':
        drawn = sampler(logits.expand(draws, -1))
    else:
        drawn = torch.cat([sampler(logits.expand(rows, -1)) for _ in range(draws)])
    counts = drawn.bincount(minlength=10)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    expected = expected[possible] * (number / expected[possible].sum())
    assert stats.chisquare(counts[possible].double(), expected).pvalue > 1e-3


def test_consecutive_draws_are_independent():
    logits = torch.zeros((1, 4))
    sampler = Sampler(4, generator=[seeded(7)])
    drawn = torch.cat([sampler(logits) for _ in range(4_000)])
    pairs = (4 * drawn[:-1] + drawn[1:]).bincount(minlength=16).view(4, 4)
    assert stats.chi2_contingency(pairs.numpy()).pvalue > 1e-3


def test_row_generator_is_independent_of_batch():
    logits = random_logits(6, 40)
    together = Sampler(40, generator=[seeded(n) for n in range(6)])
    alone = [Sampler(40, generator=[seeded(n)]) for n in range(6)]
    for _ in range(20):
        each = [sampler(row[None]) for sampler, row in zip(alone, logits)]
        assert torch.equal(together(logits), torch.cat(each))


@pytest.mark.parametrize('options', [{'temperature': 0}, {'temperature': 1e4}], ids=str)
def test_vocabulary_padding_is_never_drawn(options):
    logits = random_logits(500, 12)
    logits[:, 7:] = 100
    drawn = Sampler(7, **options, generator=seeded())(logits)
    assert drawn.unique().tolist() == list(range(7))
    logits[:, 7:] = math.nan
    assert torch.equal(Sampler(7, **options, generator=seeded())(logits), drawn)


class Fixed(Sampler):
    """A Sampler whose uniform draw in [0, 1) is the same number for every row."""

    def uniform(self, rows):
        return torch.full((rows,), self.generator, dtype=torch.float64)


@pytest.mark.parametrize('number', [0.0, 0.5, 1 - 2**-53])
def test_impossible_tokens_are_not_drawn_at_range_ends(number):
    logits = torch.full((50, 9), -math.inf)
    logits[:, 2:7] = random_logits(50, 5)
    logits[:, 4] = -math.inf
    drawn = Fixed(9, generator=number)(logits)
    assert logits.gather(1, drawn[:, None]).isfinite().all()
    ends = {0.0: 6, 1 - 2**-53: 2}
    assert number not in ends or set(drawn.tolist()) == {ends[number]}


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('temperature', [0, 1])
def test_nonfinite_logits_are_refused(value, temperature):
    logits = random_logits(3, 5)
    logits[1] = value
    with pytest.raises(UserError, match=rf'highest logit is {value}.*--dtype=float32'):
        Sampler(5, temperature=temperature)(logits)


# --- Streamed text --------------------------------------------------------------------------------


def decode_pieces(tokens):
    """Decode tokens that are pieces of UTF-8 text."""
    return b''.join(tokens).decode(errors='replace')


def cut(text: str, stops) -> str:
    """The text before the first complete stop string, by a search character by character."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@st.composite
def pieces(draw):
    """A text with characters of one and several bytes, and its bytes cut at random places."""
    text = draw(st.text('abé日😀', max_size=30))
    data = text.encode()
    cuts = draw(st.lists(st.integers(0, len(data)), max_size=40).map(sorted))
    edges = [0, *cuts, len(data)]
    return text, [data[a:b] for a, b in itertools.pairwise(edges)]


@given(pieces(), st.lists(st.text('abé日😀', min_size=1, max_size=4), max_size=3))
@settings(max_examples=300, deadline=None)
def test_stop_string_ends_text(text_and_pieces, stops):
    text, tokens = text_and_pieces
    stream = TextStream(decode_pieces, stops)
    shown = ''
    for token in tokens:
        fresh = stream.add(token)
        assert '\ufffd' not in fresh
        shown += fresh
        assert shown == stream.text and text.startswith(shown)
    ended_by_stop = stream.ended
    shown += stream.finish()
    assert shown == stream.text == cut(text, stops)
    assert ended_by_stop == any(stop in text for stop in stops)
    assert stream.ended and stream.finish() == stream.add(b'a') == ''


def test_text_is_shown_as_soon_as_no_stop_string_can_match():
    stream = TextStream(decode_pieces, ['abb', 'é'])
    shown = [stream.add(token) for token in (b'x', b'a', b'b', b'a', b'\xc3', b'\xa0', b'a', b'c')]
    assert shown == ['x', '', '', 'ab', '', 'aà', '', 'ac']


@given(st.lists(st.binary(min_size=1, max_size=3), max_size=20))
@settings(max_examples=200, deadline=None)
def test_invalid_bytes_stream_as_decoded_at_once(tokens):
    stream = TextStream(decode_pieces)
    assert ''.join(map(stream.add, tokens)) + stream.finish() == decode_pieces(tokens)


def test_end_of_text_ends_sample():
    stream = TextStream(decode_pieces, ['bc'], end_of_text=b'END')
    assert [stream.add(token) for token in (b'a', b'b', b'END', b'c')] == ['a', '', 'b', '']
    assert stream.text == 'ab' and stream.ended
