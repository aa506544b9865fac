"""Shakespeare as characters: python data/shakespeare_char/prepare.py [--source=FILE]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common.first_import  # noqa: F401

from common.errors import run_script
from data.preparation.shakespeare import prepare_shakespeare


def main(argv=None):
    # Ids in the order of the characters, as in nanoGPT.
    prepare_shakespeare(
        __file__, lambda text: {'kind': 'char', 'characters': sorted(set(text))}, argv
    )


if __name__ == '__main__':
    run_script(main)
