"""The source text of Python's own standard library, in bytes: real text that needs no download.

About 12 MB; which text exactly depends on the interpreter. Run me:
python data/python_stdlib/prepare.py
"""

import hashlib
import platform
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common.first_import  # noqa: F401

from common.errors import ArgumentParser, UserError, run_script
from common.text_files import decode
from data.preparation.pipeline import write_dataset

NOT_THE_LIBRARY = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test'}


def library_texts(root: Path) -> dict[str, str]:
    """The `.py` files below `root`, joined into the texts of 'train' and 'val'.

    A file's path decides its split, about one in ten for validation, so that neither the order nor
    the presence of other files moves it. What cannot be read as UTF-8 is left out.
    """
    texts = {'train': [], 'val': []}
    for path in sorted(root.rglob('*.py')):
        relative = path.relative_to(root)
        if NOT_THE_LIBRARY.isdisjoint(relative.parts):
            try:
                text = decode(path.read_bytes())
            except (OSError, ValueError):
                continue
            digest = hashlib.sha256(relative.as_posix().encode()).digest()
            texts['val' if digest[0] < 26 else 'train'].append(text)
    return {split: ''.join(files) for split, files in texts.items()}


def main(argv=None):
    ArgumentParser(
        description='Write train.bin, val.bin and meta.json of the standard library beside me.'
    ).parse(argv)
    root = Path(sysconfig.get_paths()['stdlib'])
    texts = library_texts(root)
    if not all(texts.values()):
        raise UserError(
            f'{root} holds no .py files to speak of: this Python keeps its library elsewhere. '
            'Prepare data/shakespeare with --source=FILE instead.'
        )
    version = f"Python {platform.python_version()}'s standard library"
    write_dataset(Path(__file__).resolve().parent, {'kind': 'byte'}, texts, version)


if __name__ == '__main__':
    run_script(main)
