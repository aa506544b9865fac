"""Datasets, one folder each: from text to token files."""
