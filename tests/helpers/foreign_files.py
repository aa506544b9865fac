"""Checkpoint folders of other libraries with one defect: a config value, index, header or pickle.

`Folders` yields the name of each defect, and a function that creates the folder and returns its
`init_from`. Folders are reused.
"""

import json
import math
import random
import shutil
import struct
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import interop
from common.errors import UserError
from helpers import foreign_configs
from helpers import transformers_models as reference
from helpers.fuzzing import fuzzed

Case = tuple[str, Callable[[], str]]
DEEP = '[' * 100_000
# Wrong values: other types, and sizes that no model has.
WRONG = (
    *(None, True, '', 'x', '\ud800', [], [1], ['x'], {}, {'x': [{}]}),
    *(-1, 0, 1, 0.5, 10**6, 10**12, 10**400, -(10**12), math.nan, math.inf, 1e308),
)
INDICES = (
    *([], {}, None, 'x', 3, {'weight_map': []}, {'weight_map': None}, {'weight_map': {'a': 3}}),
    *({'weight_map': {'a': name}} for name in ('', '.', '..', '/', 'a\0b', 'x' * 5000, '\ud800')),
    *({'weight_map': {'a': ['x']}}, {'weight_map': {}}, {'weight_map': {'a': 'config.json'}}),
)
HEADERS = (
    *([], {}, 3, {'a': None}, {'a': {}}, {'a': {'dtype': 3, 'shape': 'x', 'data_offsets': []}}),
    *(
        {'a': {'dtype': 'F32', 'shape': shape, 'data_offsets': [0, end]}}
        for shape in ([10**12], [-1], [2**62, 4], [0], 'x', [1.5], [None], [1] * 1000)
        for end in (0, 4, 10**15, -4)
    ),
    *({'a': {'dtype': d, 'shape': [1], 'data_offsets': [0, 4]}} for d in ('I32', 'U8', 'X', None)),
    {'__metadata__': {'format': 3}},
)


class _Odd:
    """An object that weights_only refuses."""


PICKLES = (
    *({3: torch.zeros(1)}, {'a': 3}, {'a': None}, {'a': {'b': torch.zeros(1)}}, [], 3, None),
    *({'a': _Odd()}, {'a': torch.zeros(1).to_sparse()}, {None: None}, {'a': [torch.zeros(2)]}),
    *({'a': torch.zeros(1, dtype=torch.int64)}, {'a': torch.zeros(1, device='meta')}),
    {'transformer.wte.weight': torch.zeros(40, 32, dtype=torch.int8)},
)


def outcome(name: str) -> str:
    """'read', 'refused', or the last line of a traceback."""
    try:
        source = interop.open_checkpoint(name)
        source.check()
        for _ in source.weights(source.config):
            pass
    except UserError:
        return 'refused'
    except Exception:
        return traceback.format_exc().strip().splitlines()[-1]
    return 'read'


class Folders:
    """Valid folders of tiny models, one per family, and copies with a defect."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.copy = folder / 'copy'

    def whole(self, family: str) -> Path:
        """The folder of a family, with every field in its config.json."""
        folder = self.folder / family
        if not folder.exists():
            fields = {'vocab_size': 40, **foreign_configs.BASES[family]}
            model = reference.from_fields(
                {**reference.NO_SPECIAL_TOKENS, 'model_type': family, **fields}
            )
            model.save_pretrained(folder)
            full = {**model.config.to_dict(), **json.loads((folder / 'config.json').read_text())}
            (folder / 'config.json').write_text(json.dumps(full))
        return folder

    def damage(self, family: str, file: str, content: bytes, without: str = '') -> str:
        """A copy of the family's folder with this file, and its `init_from`."""
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.whole(family), self.copy)
        (self.copy / without).unlink() if without else None
        (self.copy / file).write_bytes(content)
        return f'hf:{self.copy}'

    def configs(self, family: str) -> Iterator[Case]:
        """Every value of the config.json, nested ones included, set to every wrong value."""
        fields = json.loads((self.whole(family) / 'config.json').read_text())
        fields['rope_scaling'] = None
        objects = [('', fields), *((k, v) for k, v in fields.items() if isinstance(v, dict))]
        for within, values in objects:
            for key in values:
                for wrong in WRONG:
                    changed = {**values, key: wrong}
                    whole = {**fields, within: changed} if within else changed
                    label = f'{family}: {within}.{key}={str(wrong)[:20]!r}'
                    yield label, partial(self._config, family, json.dumps(whole))
                deep = json.dumps({**values, key: 'DEEP'}).replace('"DEEP"', DEEP)
                if not within:
                    yield f'{family}: {key} nested', partial(self._config, family, deep)
        for text in ('', '[]', '3', 'null', '{', DEEP, '\ufeff{}', '{"a":' + '9' * 5000 + '}'):
            yield f'{family}: config.json {text[:10]!r}', partial(self._config, family, text)

    def _config(self, family: str, text: str) -> str:
        return self.damage(family, 'config.json', text.encode('utf-8', 'surrogatepass'))

    def indices(self, family: str) -> Iterator[Case]:
        weights = 'model.safetensors'
        for text in (*map(json.dumps, INDICES), DEEP, '', '{'):
            for kind in (weights, 'pytorch_model.bin'):
                name = f'{kind}.index.json'
                yield (
                    f'{name} {text[:40]}',
                    partial(self.damage, family, name, text.encode(), weights),
                )

    def headers(self, family: str) -> Iterator[Case]:
        name = 'model.safetensors'
        whole = (self.whole(family) / name).read_bytes()
        (length,) = struct.unpack('<Q', whole[:8])
        header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
        texts = [json.dumps(h) for h in HEADERS]
        for key, entry in list(header.items())[:4]:
            texts += [json.dumps({**header, key: wrong}) for wrong in WRONG]
            for part in entry if isinstance(entry, dict) else ():
                changed = ({**entry, part: wrong} for wrong in WRONG)
                texts += [json.dumps({**header, key: other}) for other in changed]
        for text in (*texts, DEEP, '{'):
            content = struct.pack('<Q', len(text)) + text.encode() + data
            yield f'header {text[:60]}', partial(self.damage, family, name, content)
        for size in (0, 2**40, 2**64 - 1, len(whole)):
            content = struct.pack('<Q', size) + whole[8:]
            yield f'header of {size} bytes', partial(self.damage, family, name, content)

    def pickles(self, family: str, cases: int) -> Iterator[Case]:
        """Other objects in place of tensors, and randomly damaged bytes."""
        name, other = 'pytorch_model.bin', 'model.safetensors'
        for content in PICKLES:
            torch.save(content, self.folder / name)
            damaged = (self.folder / name).read_bytes()
            yield f'{name} {str(content)[:40]}', partial(self.damage, family, name, damaged, other)
        from safetensors.torch import load_file

        tensors = load_file(self.whole(family) / other)
        for zipped in (True, False):
            torch.save(tensors, self.folder / name, _use_new_zipfile_serialization=zipped)
            content = (self.folder / name).read_bytes()
            yield f'{name} whole', partial(self.damage, family, name, content, other)
            for number in range(cases):
                damaged = fuzzed(content, random.Random(number))
                yield f'{name} fuzzed {number}', partial(self.damage, family, name, damaged, other)
        content = (self.whole(family) / other).read_bytes()
        for number in range(cases):
            damaged = fuzzed(content, random.Random(number))
            yield f'{other} fuzzed {number}', partial(self.damage, family, other, damaged)

    def nanogpt(self) -> Iterator[Case]:
        """Wrong values in model_args and state of nanoGPT checkpoints."""
        arguments = {'n_layer': 1, 'n_head': 2, 'n_embd': 8, 'block_size': 8, 'vocab_size': 9}
        cases = [{'model_args': {**arguments, key: w}} for key in arguments for w in WRONG]
        cases += [{'model_args': {**arguments, 'bias': wrong}} for wrong in WRONG]
        cases += [{'model_args': wrong} for wrong in (*WRONG, {3: 4})]
        cases += [{'model_args': arguments, 'model': state} for state in PICKLES]
        cases += WRONG
        for content in cases:
            whole = (
                {'model': {'a': torch.zeros(1)}, **content} if type(content) is dict else content
            )
            yield f'ckpt.pt {str(content)[:60]}', partial(self._checkpoint, whole)

    def _checkpoint(self, content) -> str:
        torch.save(content, self.folder / 'ckpt.pt')
        return f'nanogpt:{self.folder / "ckpt.pt"}'
