"""FineWeb's sample of 10 billion tokens (Penedo et al. 2024), about 45 GB of text.

Takes the options of data/prepare.py; --hf_subset=sample-100BT is ten times as large. To try a part
first:

    python data/fineweb/prepare.py --max_documents=20000
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common.first_import  # noqa: F401

from common.errors import run_script
from data import prepare


def main(argv=None):
    folder = Path(__file__).resolve().parent
    mine = ['--hf=HuggingFaceFW/fineweb', '--hf_subset=sample-10BT', '--val_fraction=0.001']
    prepare.main([*mine, f'--out={folder}', *(sys.argv[1:] if argv is None else argv)])


if __name__ == '__main__':
    run_script(main)
