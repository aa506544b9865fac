"""The data order: the window of the training split for sequence number n.

An order is a pure function of the data seed and n, without state or tables. Ranks and micro-batches
only divide the numbers, and a resumed run needs only the number that it had reached. A window of T
tokens reads T + 1 of the split's N, since targets are one token later.

`random`: number n starts at

    (output n of SplitMix64 seeded with a hash of the data seed) mod (N - T)

(Steele, Lea & Flood 2014). Windows are drawn with replacement, as in nanoGPT. The bias of a 64-bit
number modulo the size of a split is below 10^-7 even for 10^12 tokens.

`epoch`: the split is cut into W = N // T - 1 consecutive windows (at least 1), and numbers
e·W … (e+1)·W - 1 are all of them, once each, in a new random order in each epoch e. The cuts shift
too, by a random number below T for each epoch, so that a text is not always cut at the same places.
The tokens before the first and after the last window, fewer than 2·T, are skipped in that epoch;
they are different ones in each epoch.
The shuffle is a permutation of [0, W) that is computed without a table: a Feistel network (Luby &
Rackoff 1988) on an even number of bits, applied until the result is below W (cycle walking; Black &
Rogaway 2002, "Ciphers with arbitrary finite domains").
"""

from functools import lru_cache

import numpy as np

ROUNDS = 6  # of the Feistel network: four suffice for many bits, more are needed for few
MIN_HALF_BITS = 3  # a network on fewer bits has too few permutations
CHUNK = 4096  # indices computed at a time, as the cost hardly depends on their number


class RandomOrder:
    """Windows drawn uniformly with replacement; every position of the split is a possible start."""

    windows_per_epoch = None  # there are no epochs

    def __init__(self, data_seed: int, tokens: int, block_size: int):
        self.block_size, self.positions = block_size, tokens - block_size
        self.tokens_per_epoch = tokens
        self.key = _seed_key(data_seed)

    def starts(self, first_number: int, count: int) -> np.ndarray:
        """Starts of the sequences first_number … first_number + count - 1: int64 (count,)."""
        outputs = splitmix64(self.key, _sequence_numbers(first_number, count))
        return (outputs % np.uint64(self.positions)).astype(np.int64)

    def unique_tokens(self, sequences: int) -> int:
        """Expected number of different tokens in the inputs of the first `sequences`.

        If c of the P possible windows contain a token, all n draws miss it with probability
        (1 - c/P)^n. Near the ends of the split, c decreases to 1, token by token.
        """
        most = min(self.block_size, self.positions)
        inputs = self.positions + self.block_size - 1
        windows_per_token = np.arange(1, most + 1)
        count = np.full(most, 2)
        count[-1] = inputs - 2 * (most - 1)
        return round(float(count @ (1 - (1 - windows_per_token / self.positions) ** sequences)))


class EpochOrder:
    """Every window once per epoch, with another order and other cuts in each epoch."""

    def __init__(self, data_seed: int, tokens: int, block_size: int):
        self.block_size = block_size
        self.windows_per_epoch = max(1, tokens // block_size - 1)
        self.tokens_per_epoch = self.windows_per_epoch * block_size
        self.shifts = min(block_size, tokens - self.tokens_per_epoch)  # cuts to choose from
        self.key = _seed_key(data_seed)
        self._chunk = lru_cache(maxsize=2)(self._starts_of_chunk)

    def starts(self, first_number: int, count: int) -> np.ndarray:
        """Starts of the sequences first_number … first_number + count - 1: int64 (count,)."""
        end = first_number + count
        chunks = range(first_number // CHUNK, -(-end // CHUNK))
        starts = np.concatenate([self._chunk(chunk) for chunk in chunks])
        skipped = first_number - chunks.start * CHUNK
        return starts[skipped : skipped + count]

    def unique_tokens(self, sequences: int) -> int:
        """Exact number of different tokens in the inputs of the first `sequences`.

        The complete epochs cover all tokens from the smallest shift to the end of the windows with
        the largest shift. The current epoch can add only tokens of its first and last window.
        """
        epoch, seen = divmod(sequences, self.windows_per_epoch)
        if epoch == 0:
            return seen * self.block_size
        shifts = self.shift(np.arange(epoch + 1, dtype=np.uint64)).tolist()
        low, high, shift = min(shifts[:epoch]), max(shifts[:epoch]), shifts[epoch]
        edges = np.array([0, self.windows_per_epoch - 1], np.uint64)
        keys = np.repeat(self._epoch_keys(epoch), 2)
        first, last = (unshuffle_index(edges, keys, self.windows_per_epoch) < seen).tolist()
        added = first * max(0, low - shift) + last * max(0, shift - high)
        return self.tokens_per_epoch + high - low + added

    def shift(self, epochs: np.ndarray) -> np.ndarray:
        """Where the first window of each of the `epochs` (uint64) begins: int64."""
        drawn = splitmix64(self._epoch_keys(epochs), ROUNDS)  # the index after those of the rounds
        return (drawn % np.uint64(self.shifts)).astype(np.int64)

    def _epoch_keys(self, epochs) -> np.ndarray:
        return splitmix64(self.key, epochs)

    def _starts_of_chunk(self, chunk: int) -> np.ndarray:
        size = self.windows_per_epoch
        epochs, indices = np.divmod(_sequence_numbers(chunk * CHUNK, CHUNK), np.uint64(size))
        windows = shuffle_index(indices, self._epoch_keys(epochs), size)
        return self.shift(epochs) + windows.astype(np.int64) * self.block_size


ORDERS: dict[str, type[RandomOrder] | type[EpochOrder]] = {
    'random': RandomOrder,
    'epoch': EpochOrder,
}


def shuffle_index(indices: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
    """Each of `indices` under the permutation of [0, size) that its key in `keys` selects.

    All are uint64 of one shape; `size` is at most 2^62.
    """
    return _cycle_walk(indices, keys, size, range(ROUNDS))


def unshuffle_index(indices: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
    """The inverse of `shuffle_index`."""
    return _cycle_walk(indices, keys, size, range(ROUNDS - 1, -1, -1))


def _cycle_walk(indices: np.ndarray, keys: np.ndarray, size: int, rounds: range) -> np.ndarray:
    half_bits = max(MIN_HALF_BITS, -(-(size - 1).bit_length() // 2))
    indices = _feistel(indices, keys, half_bits, rounds)
    while len(outside := np.flatnonzero(indices >= size)):
        indices[outside] = _feistel(indices[outside], keys[outside], half_bits, rounds)
    return indices


def _feistel(numbers: np.ndarray, keys: np.ndarray, half_bits: int, rounds: range) -> np.ndarray:
    """A permutation of [0, 4^half_bits) for each key; its inverse if the rounds are reversed."""
    mask, shift = np.uint64(2**half_bits - 1), np.uint64(half_bits)
    left, right = numbers >> shift, numbers & mask
    for number in rounds:
        left, right = right, left ^ (splitmix64(splitmix64(keys, number), right) & mask)
    return right << shift | left


def splitmix64(seed, numbers) -> np.ndarray:
    """Outputs `numbers` (from 0) of the SplitMix64 generator that starts at `seed`: uint64 (N,)."""
    # All arithmetic is modulo 2^64: uint64 arrays of numpy wrap silently, its scalars warn.
    numbers = np.atleast_1d(np.asarray(numbers, np.uint64))
    x = np.asarray(seed, np.uint64) + (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _seed_key(data_seed: int) -> np.ndarray:
    # Hash the seed, so that the streams of neighboring seeds are unrelated.
    return splitmix64(data_seed % 2**64, 0)


def _sequence_numbers(first: int, count: int) -> np.ndarray:
    return int(first) + np.arange(count, dtype=np.uint64)
