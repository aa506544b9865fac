"""Advice for a corpus that leaves one of the splits empty; it is tried on the corpus first."""

import hashlib

from data.preparation.sources import DocumentSource, FileSource
from data.preparation.train_tokenizer import valid_texts

PARTS, SMALLEST_CUT = 200, 64  # intended number of parts; smallest size of a part in bytes


def split_hint(source: DocumentSource, val_fraction: float) -> str:
    """Options with which both splits get documents, tried on the corpus; else what it lacks."""
    if source.unit != 'B':  # trying options would download it again
        return 'Increase --max_documents or change --val_fraction.'
    cut_sources: dict[int, DocumentSource] = {}
    if isinstance(source, FileSource) and source.has_only_texts:
        for cut in (max(sum(source.sizes) // PARTS, SMALLEST_CUT), SMALLEST_CUT):
            cut_sources.setdefault(cut, source.with_cut(cut))
    shares, option = validation_thresholds(source), ''
    for cut, cut_source in cut_sources.items():
        shares, option = validation_thresholds(cut_source), f'--cut={cut} '
        if shares and shares[0] < val_fraction <= shares[-1]:
            return f'To get more documents, cut the texts at blank lines: {option.strip()}'
    if len(shares) < 2:
        return 'Add texts: at least two different documents are needed.'
    first = 0 if shares[0] >= val_fraction else len(shares) - 2  # of the two neighbors to separate
    between = (shares[first] + shares[first + 1]) / 2
    return (
        f'To get both splits, choose another share for validation: '
        f'{option}--val_fraction={between:.6g}'
    )


def validation_thresholds(source: DocumentSource) -> list[float]:
    """For each different document, the smallest val_fraction that makes it validation; sorted."""
    digests = {
        hashlib.sha256(text.encode()).digest()[:8]
        for batch in source.batches()
        for text in valid_texts(batch)
        if text and not text.isspace()
    }
    return sorted(int.from_bytes(digest, 'big') / 2**64 for digest in digests)
