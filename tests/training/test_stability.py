"""Detection of loss spikes; test_nonfinite.py tests non-finite values."""

import numpy as np

from training import stability


def test_spike_is_six_deviations_above_recent_losses():
    generator = np.random.default_rng(0)
    losses, recent, spikes = [], [], 0
    for step in range(400):
        before = np.array([loss for loss in losses if np.isfinite(loss)][-32:])
        loss, expected = generator.normal(4, 0.1), False
        if len(before) == 32:
            limit = before.mean() + 6 * before.std()
            # Just above and just below the limit, and NaN.
            loss = {0: limit + 1e-6, 20: limit - 1e-6, 40: np.nan}.get(step % 60, loss)
            expected = loss > limit
        losses.append(float(loss))
        assert stability.is_spike(losses[-1], recent) == expected
        spikes += expected
    assert spikes == 6 and not stability.is_spike(-np.inf, recent)
    assert stability.is_spike(np.inf, recent)
    assert recent == [loss for loss in losses if np.isfinite(loss)][-32:]
