"""Begin from other people's weights, and write ours for them, by the tables of `weight_maps`.

python train.py config/mine.py --init_from=gpt2                    # or gpt2-medium, -large, -xl
python train.py config/mine.py --init_from=hf:FOLDER_OR_NAME       # Hugging Face
python train.py config/mine.py --init_from=nanogpt:out/ckpt.pt     # nanoGPT
python export_checkpoint.py --format=hf --output=FOLDER
"""

from interop.exporter import check_export, export, expressed_as, save_tensors, tell_tokens
from interop.families import TRANSFORMERS
from interop.pretrained import Imported, find
from interop.source import Source, open_source, weight_of

__all__ = [
    'TRANSFORMERS',
    'Imported',
    'Source',
    'check_export',
    'export',
    'expressed_as',
    'find',
    'open_source',
    'save_tensors',
    'tell_tokens',
    'weight_of',
]
