"""Make a dataset from the source code of Python's standard library: no download needed.

    python data/python_stdlib/prepare.py

Writes train.bin, val.bin and meta.json into data/python_stdlib: about 12 MB, as bytes. The exact
text depends on the interpreter.
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

    A file's path decides its split, about one in ten for validation, independently of the other
    files. Files that are not UTF-8 are skipped.
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
    ArgumentParser(prog='data/python_stdlib/prepare.py', description=__doc__).parse(argv)
    root = Path(sysconfig.get_paths()['stdlib'])
    texts = library_texts(root)
    if not all(texts.values()):
        raise UserError(
            f'{root} has no source code of the standard library: this Python keeps it elsewhere. '
            'Prepare data/shakespeare with --source=FILE instead.'
        )
    version = f"Python {platform.python_version()}'s standard library"
    write_dataset(Path(__file__).resolve().parent, {'kind': 'byte'}, texts, version)


if __name__ == '__main__':
    run_script(main)
