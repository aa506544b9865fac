"""Recognize the format of token files from their content, for folders without meta.json.

nanoGPT's files are uint16, little endian, without a header. Files of other formats look the same;
read as uint16, they would yield wrong ids and a misleading loss.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.text_files import SIGNATURES, text_problem

NUMPY = b'\x93NUMPY'
LLM_C = {20240520: 'uint16', 20240801: 'uint32'}  # first of the header's 256 words: type of the ids
LLM_C_HEADER = 1024
SAMPLES, SAMPLE_BYTES = 64, 4096
FEWEST_BYTES = 256  # a smaller sample proves nothing
FEWEST_IDS = 4  # different ids that prove a wide type: two may alternate in uint16 too
LARGEST_HIGH_HALF = 15  # largest upper half of an id: vocabularies below 2^20
ENTROPY_GAP = 0.5  # bits by which the entropy of high bytes is below that of low bytes


@dataclass(frozen=True)
class IdFormat:
    """The format of ids in a file: `dtype` is numpy's name, `skip` the size of the header."""

    dtype: str = 'uint16'
    big_endian: bool = False
    skip: int = 0
    program: str = ''

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder('>' if self.big_endian else '<')

    def __str__(self) -> str:
        order = ', big endian' if self.big_endian else ''
        header = f', with a header of {self.program}' if self.program else ''
        return f'{self.dtype}{order}{header}'


def recognize_format(path: Path) -> IdFormat | str:
    """The format of the ids in a file, uint16 if in doubt; or a description of another file.

    Raises OSError.
    """
    size = path.stat().st_size
    with open(path, 'rb') as file:
        begin = file.read(LLM_C_HEADER)
        if begin.startswith(NUMPY):
            file.seek(0)
            return _numpy_header(file)
        word = int.from_bytes(begin[:4], 'little')
        if len(begin) == LLM_C_HEADER and word in LLM_C:
            return IdFormat(LLM_C[word], skip=LLM_C_HEADER, program='llm.c')
        for signature, what in SIGNATURES.items():
            if len(signature) > 3 and begin.startswith(signature):
                return what
        last = max(size - SAMPLE_BYTES, 0)
        starts = sorted({last * i // (SAMPLES - 1) // 8 * 8 for i in range(SAMPLES)})
        sample = bytearray()
        for start in starts:
            file.seek(start)
            content = file.read(SAMPLE_BYTES)
            sample += content[: len(content) // 8 * 8]
    return _by_content(bytes(sample), size)


def _numpy_header(file) -> IdFormat | str:
    try:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    except ValueError:
        return 'a damaged file of numpy.save'
    if len(shape) != 1 or dtype.kind not in 'uif':
        return f'a file of numpy.save with {dtype} of shape {shape}, not a vector of ids'
    big_endian = dtype.newbyteorder('=') != dtype
    return IdFormat(dtype.newbyteorder('=').name, big_endian, file.tell(), 'numpy.save')


def _by_content(sample: bytes, size: int) -> IdFormat:
    """The format, from statistics that uint16 ids of text do not have."""
    if len(sample) < FEWEST_BYTES or not any(sample):
        return IdFormat()
    for big_endian in (False, True):
        order = '>' if big_endian else '<'
        for dtype, width in (('float16', 2), ('float32', 4), ('float64', 8)):
            if size % width == 0 and _are_ids(np.frombuffer(sample, f'{order}f{width}')):
                return IdFormat(dtype, big_endian)
        for dtype, width in (('int64', 8), ('uint32', 4)):
            if size % width == 0 and _are_wide(np.frombuffer(sample, f'{order}u{width}')):
                return IdFormat(dtype, big_endian)
    values = np.frombuffer(sample, np.uint8)
    # Some high bytes of ids are small; those of text never are.
    if values.min() >= ord('\t') and text_problem(sample[:SAMPLE_BYTES]) is None:
        return IdFormat('uint8')
    low, high = values[::2], values[1::2]
    if not low.any() or _entropy(high) > _entropy(low) + ENTROPY_GAP:
        return IdFormat('uint16', big_endian=True)
    return IdFormat()


def _are_ids(values: np.ndarray) -> bool:
    """Whether these floats look like ids: whole, not negative, not too large."""
    with np.errstate(invalid='ignore'):
        values = values.astype(np.float64)
    return bool(
        np.isfinite(values).all()
        and values.max() >= 1
        and values.min() >= 0
        and values.max() < 2**24
        and (values == np.floor(values)).all()
    )


def _are_wide(values: np.ndarray) -> bool:
    """Whether these integers look like ids with almost unused upper halves."""
    lower, upper = values & 0xFFFF, values >> 16
    if len(np.unique(lower)) < FEWEST_IDS:
        return False
    if not upper.any():
        return True
    return bool(upper.max() <= LARGEST_HIGH_HALF and lower.max() > 255)


def _entropy(values: np.ndarray) -> float:
    """The entropy of bytes in bits."""
    share = np.bincount(values, minlength=256) / len(values)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())
