"""The global order of windows: random, or each window once per epoch."""

import math
import tracemalloc
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from data.order import (
    CHUNK,
    ORDERS,
    EpochOrder,
    RandomOrder,
    shuffle_index,
    splitmix64,
    unshuffle_index,
)

# (tokens, block_size): exactly one window, nearly two, one token left over, primes, …
SIZES = [
    (17, 16),
    (31, 16),
    (33, 16),
    (65, 16),
    (1009, 16),
    (997, 31),
    (4001, 7),
    (2, 1),
    (51, 1),
]


def test_splitmix64_matches_published_outputs():
    # Vigna's reference implementation, seed 1234567.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert splitmix64(1234567, np.arange(5)).tolist() == published


@pytest.mark.parametrize('sampling', ORDERS)
def test_any_int_is_a_seed(sampling):
    orders = (ORDERS[sampling](seed, 10**6, 16) for seed in (-1, 0, 1, 2**63))
    assert len({tuple(order.starts(0, 4)) for order in orders}) == 4


@pytest.mark.slow
@pytest.mark.parametrize('sampling', ORDERS)
@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(40, 5000),
    first=st.integers(0, 3 * CHUNK),
    cuts=st.lists(st.integers(1, 50), min_size=1, max_size=8),
)
def test_order_is_independent_of_batching(sampling, tokens, first, cuts):
    order = ORDERS[sampling](7, tokens, 32)
    whole = order.starts(first, sum(cuts))
    begins = np.cumsum([first, *cuts[:-1]]).tolist()
    # Each part in a new process, like a rank or a resumed run.
    parts = [ORDERS[sampling](7, tokens, 32).starts(*part) for part in zip(begins, cuts)]
    assert np.concatenate(parts).tolist() == whole.tolist()
    assert whole.dtype == np.int64 and len(whole) == sum(cuts)


@pytest.mark.parametrize('sampling', ORDERS)
@pytest.mark.parametrize('ranks, micro_batch', [(1, 24), (1, 5), (2, 4), (3, 1), (4, 2)])
def test_order_is_divided_among_ranks_and_micro_batches(sampling, ranks, micro_batch):
    """As in train.py: micro-step m of an iteration belongs to rank m modulo the number of ranks."""
    micro_steps, stopped_after = 3 * ranks, 5
    per_iteration = micro_steps * micro_batch
    seen = {}
    for iterations in (range(stopped_after), range(stopped_after, 9)):
        for rank in range(ranks):
            order = ORDERS[sampling](3, 500, 16)  # a new process
            for iteration in iterations:
                for micro_step in range(rank, micro_steps, ranks):
                    number = (iteration * micro_steps + micro_step) * micro_batch
                    starts = order.starts(number, micro_batch).tolist()
                    seen |= dict(zip(range(number, number + micro_batch), starts))
    whole = ORDERS[sampling](3, 500, 16).starts(0, 9 * per_iteration).tolist()
    assert [seen[number] for number in range(len(seen))] == whole


# --- Random order ---------------------------------------------------------------------------------


def test_random_order_is_unchanged():
    """Published losses and resumed runs depend on it."""
    order = RandomOrder(1337, 10**6, 16)
    assert order.starts(0, 6).tolist() == [982578, 203550, 346646, 474016, 115914, 567786]
    order = RandomOrder(1337, 10**12 + 16, 16)
    assert order.starts(10**12, 3).tolist() == [149526806476, 627635008425, 563577911070]
    assert RandomOrder(0, 1000, 16).starts(0, 3).tolist() == [207, 86, 983]


@pytest.mark.parametrize('positions', [100, 2**32 + 12345, 9 * 10**11])
def test_random_starts_are_uniform(positions):
    one, other = (RandomOrder(seed, positions + 8, 8).starts(0, 50_000) for seed in (1337, 1338))
    counts = np.histogram(one, bins=100, range=(0, positions))[0]
    assert stats.chisquare(counts).pvalue > 1e-3
    assert stats.kendalltau(one[:5000], other[:5000]).pvalue > 1e-3
    assert stats.kendalltau(one[:5000], one[1:5001]).pvalue > 1e-3
    assert len(np.intersect1d(one, other)) < 200 or positions == 100


@pytest.mark.parametrize(
    'tokens, block_size, sequences',
    [(1000, 16, 50), (1000, 16, 1), (30, 20, 3), (100, 99, 5), (60, 30, 4), (1000, 16, 0)],
)
def test_expected_unique_tokens(tokens, block_size, sequences):
    counts = []
    for seed in range(400):
        starts = RandomOrder(seed, tokens, block_size).starts(0, sequences)
        counts.append(len(set((starts[:, None] + np.arange(block_size)).ravel().tolist())))
    expected = RandomOrder(0, tokens, block_size).unique_tokens(sequences)
    assert abs(np.mean(counts) - expected) <= 4 * stats.sem(counts) + 0.5  # 0.5 for rounding


# --- Epoch order ----------------------------------------------------------------------------------


def assert_every_window_once(order: EpochOrder, tokens: int, epoch: int) -> np.ndarray:
    """Assert this for one epoch by counting; return its starts in order."""
    windows = order.windows_per_epoch
    starts = order.starts(epoch * windows, windows)
    touched = Counter((starts[:, None] + np.arange(order.block_size)).ravel().tolist())
    assert set(touched.values()) == {1}
    assert len(touched) == windows * order.block_size == order.tokens_per_epoch
    assert min(touched) >= 0 and max(touched) + 1 < tokens  # the last target is within the split
    assert max(touched) - min(touched) + 1 == len(touched)  # consecutive blocks without a gap
    assert tokens - len(touched) <= 2 * order.block_size - 1  # the tokens left out
    return starts


@pytest.mark.parametrize('tokens, block_size', SIZES)
def test_one_epoch_visits_every_window_once(tokens, block_size):
    order = EpochOrder(1337, tokens, block_size)
    for epoch in (0, 1, 2, 10**6):
        assert_every_window_once(order, tokens, epoch)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    block_size=st.integers(1, 40),
    beyond=st.integers(1, 3000),
    seed=st.integers(0, 2**64),
    epoch=st.integers(0, 2**30),
)
def test_epochs_visit_every_window_once(block_size, beyond, seed, epoch):
    tokens = block_size + beyond
    assert_every_window_once(EpochOrder(seed, tokens, block_size), tokens, epoch)


def test_epochs_and_seeds_differ():
    orders = [EpochOrder(seed, 10_007, 64) for seed in (1, 2)]
    epochs = [assert_every_window_once(order, 10_007, e) for order in orders for e in range(20)]
    cuts = [starts.min() for starts in epochs]
    assert len(set(cuts)) > 20  # of 64
    shuffles = [(starts - starts.min()).tolist() for starts in epochs]
    for one, other in pairwise(shuffles):
        assert one != sorted(one) and one != other
        assert stats.kendalltau(one, other).pvalue > 1e-4
    assert len(set(map(tuple, shuffles))) == len(shuffles)


def test_cuts_are_uniform():
    order = EpochOrder(5, 1000, 16)
    counts = Counter(order.shift(np.arange(16_000, dtype=np.uint64)).tolist())
    assert set(counts) == set(range(16))
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(
    size=st.one_of(st.integers(1, 300), st.integers(1, 2**62)),
    key=st.integers(0, 2**64 - 1),
    data=st.data(),
)
def test_permutation_has_an_inverse(size, key, data):
    chosen = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    indices, keys = np.array(chosen, np.uint64), np.full(len(chosen), key, np.uint64)
    images = shuffle_index(indices, keys, size)
    assert len(set(images.tolist())) == len(chosen) and int(images.max()) < size
    assert unshuffle_index(images, keys, size).tolist() == chosen
    assert shuffle_index(unshuffle_index(indices, keys, size), keys, size).tolist() == chosen
    assert indices.tolist() == chosen


@pytest.mark.parametrize('size', [2, 3, 4, 5])
def test_permutations_are_uniform(size):
    keys = splitmix64(11, np.arange(24_000))
    images = [
        shuffle_index(np.full(len(keys), place, np.uint64), keys, size) for place in range(size)
    ]
    counts = Counter(zip(*(image.tolist() for image in images)))
    assert len(counts) == math.factorial(size)
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_neighbors_are_shuffled_apart():
    images = shuffle_index(
        np.arange(20_000, dtype=np.uint64), np.full(20_000, 7, np.uint64), 20_000
    )
    images = images.astype(np.int64)
    assert stats.kendalltau(np.arange(5000), images[:5000]).pvalue > 1e-3
    assert stats.kendalltau(images[:5000], images[1:5001]).pvalue > 1e-3
    # The gaps between neighbors' images are those of two random numbers without replacement.
    gaps = np.abs(np.diff(images)) / 20_000
    assert stats.kstest(gaps, stats.triang(0).cdf).pvalue > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize('tokens, block_size', SIZES)
def test_unique_tokens_equal_counted_tokens(tokens, block_size):
    order = EpochOrder(3, tokens, block_size)
    sequences = min(5 * order.windows_per_epoch + 3, 3000)
    seen = set()
    for number, start in enumerate(order.starts(0, sequences).tolist()):
        assert order.unique_tokens(number) == len(seen)
        seen |= set(range(start, start + block_size))
    assert order.unique_tokens(sequences) == len(seen)


def test_shuffle_needs_no_table():
    order = EpochOrder(1, 10**15, 1024)
    tracemalloc.start()
    for number in range(0, 10**12, 10**11):
        assert order.starts(number, 100).max() + 1024 < 10**15
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
