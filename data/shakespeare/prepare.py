"""Shakespeare in GPT-2's byte pairs: python data/shakespeare/prepare.py [--source=FILE]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common.first_import  # noqa: F401

from common.errors import run_script
from data.preparation.shakespeare import prepare_shakespeare


def main(argv=None):
    prepare_shakespeare(__file__, lambda text: {'kind': 'gpt2'}, argv)


if __name__ == '__main__':
    run_script(main)
