"""A part of a comparison: a titled table, lines or texts, whatever their format."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Section:
    """A title, what it means, and a table, lines or texts."""

    title: str
    notes: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    align: str = ''  # '<' or '>' for each column
    lines: list[str] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)  # headings and what is below them
