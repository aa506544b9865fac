"""Start from pretrained weights, and export weights, by the tables in `families`.

python train.py config/mine.py --init_from=gpt2                    # or gpt2-medium, -large, -xl
python train.py config/mine.py --init_from=hf:FOLDER_OR_NAME       # Hugging Face
python train.py config/mine.py --init_from=nanogpt:out/ckpt.pt     # nanoGPT
python export_checkpoint.py --format=hf --output=FOLDER
"""

from interop.exporter import (
    check_export,
    convert_config,
    export,
    save_tensors,
    write_generation_config,
)
from interop.families import TRANSFORMERS
from interop.layers import layer_config
from interop.pretrained import PretrainedSource, find_pretrained
from interop.pretrained_checkpoint import PretrainedCheckpoint, open_checkpoint, tensor_map_of

__all__ = [
    'TRANSFORMERS',
    'PretrainedCheckpoint',
    'PretrainedSource',
    'check_export',
    'convert_config',
    'export',
    'find_pretrained',
    'layer_config',
    'open_checkpoint',
    'save_tensors',
    'tensor_map_of',
    'write_generation_config',
]
