"""benchmarks/loader.py: an epoch is read in constant memory."""

from benchmarks import loader
from data.dataset import load_dataset


def test_epoch_visits_every_window_in_constant_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, 'FILE_TOKENS', 2**22 + 12_345)
    data = load_dataset(loader.write_tokens(tmp_path, 13_000_000), 1024)  # 26 MB
    assert len(data.splits['train'].paths) == 4 and data.tokens('train') == 13_000_000
    measured = loader.read_an_epoch(data, 'epoch', 12)
    assert measured['windows'] == measured['once'] == 13_000_000 // 1024 - 1
    assert max(measured['growth']) < data.splits['train'].nbytes / 3
    again = loader.read_an_epoch(data, 'random', 12)
    assert again['once'] < 0.5 * again['windows']  # what is counted can tell
