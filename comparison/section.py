"""A section of a comparison: a title with a table, lines or texts, in no particular format."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Section:
    """A title, notes on its meaning, and a table, lines or texts."""

    title: str
    notes: list[str] = field(default_factory=list)
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    align: str = ''  # '<' or '>' for each column
    lines: list[str] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)  # (heading, text)
