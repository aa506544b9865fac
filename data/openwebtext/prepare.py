"""OpenWebText (Gokaslan & Cohen 2019): 8 million pages, about 40 GB of text, 9 billion tokens.

Takes the options of data/prepare.py. To try a part first:

    python data/openwebtext/prepare.py --max_documents=20000
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common.first_import  # noqa: F401

from common.errors import run_script
from data import prepare


def main(argv=None):
    folder = Path(__file__).resolve().parent
    # nanoGPT's share of validation data.
    mine = ['--hf=Skylion007/openwebtext', '--val_fraction=0.0005', f'--out={folder}']
    prepare.main([*mine, *(sys.argv[1:] if argv is None else argv)])


if __name__ == '__main__':
    run_script(main)
