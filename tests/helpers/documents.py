"""The project's Markdown pages: code fences, shell commands, headings and links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helpers.project import PROJECT

README = PROJECT / 'README.md'
# The pages whose commands and Python code are run.
PAGES = [README, PROJECT / 'CONTRIBUTING.md', *sorted((PROJECT / 'docs').glob('*.md'))]
ALL_PAGES = [*PAGES, PROJECT / 'CHANGELOG.md', *sorted((PROJECT / 'benchmarks').glob('*.md'))]

SHELL = ('sh', 'bash')
_FENCE = re.compile(r'^```(\w*)[ \t]*\n(.*?)^```[ \t]*$', flags=re.M | re.S)
_LOOP = re.compile(r'^for (\w+) in ([^;\n]+)[;\n]\s*do\s+(.*?)[;\n]\s*done$', flags=re.M | re.S)
_LINK = re.compile(r'!?\[[^\]]*\]\(([^)\s]+)\)')


@dataclass(frozen=True)
class Fence:
    """A fenced block of code; `line` is the line of its first line of code."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f'{page_name(self.page)}:{self.line}'


@dataclass(frozen=True)
class Command:
    """One program with its arguments, as a shell would start it."""

    fence: Fence
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return shlex.join(self.words)

    def __str__(self) -> str:
        return f'{self.fence}: {self.text}'

    @property
    def script(self) -> str | None:
        """The script that it runs, itself or by torchrun: 'train.py', 'data/prepare.py'."""
        if self.words[0] not in ('python', 'python3', 'torchrun'):
            return None
        return next((word for word in self.words[1:] if not word.startswith('-')), None)

    @property
    def arguments(self) -> list[str]:
        """The arguments of that script."""
        script = self.script
        return list(self.words[self.words.index(script) + 1 :]) if script else []


def page_name(page: Path) -> str:
    return page.relative_to(PROJECT).as_posix()


def fences(page: Path, *languages: str) -> list[Fence]:
    """The code fences of a page, all or those of some languages ('' for none)."""
    text = page.read_text(encoding='utf-8')
    return [
        Fence(page, text.count('\n', 0, match.start(2)) + 1, match[1], match[2])
        for match in _FENCE.finditer(text)
        if not languages or match[1] in languages
    ]


def prose(page: Path) -> str:
    """The page without its code fences."""
    return _FENCE.sub('', page.read_text(encoding='utf-8'))


def commands(fence: Fence) -> Iterator[Command]:
    """The commands of a shell fence: continuations joined, loops unrolled, `&&` and `;` split."""
    for words in _simple_commands(_unrolled(fence.text.replace('\\\n', ' '))):
        yield Command(fence, tuple(words))


def _unrolled(script: str) -> str:
    def unroll(match: re.Match) -> str:
        name, values, body = match.groups()
        pattern = re.compile(rf'\$\{{{name}\}}|\${name}\b')
        return '\n'.join(pattern.sub(value, body) for value in values.split())

    return _LOOP.sub(unroll, script)


def _simple_commands(script: str) -> Iterator[list[str]]:
    for line in script.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=';&|<>')
        lexer.whitespace_split, lexer.commenters = True, '#'
        words: list[str] = []
        for word in lexer:
            if word in (';', '&&'):
                yield words
                words = []
            elif set(word) <= set(';&|<>'):
                raise ValueError(f'{word!r} in a documented command is not supported: {line}')
            else:
                words.append(word)
        if words:
            yield words


def headings(page: Path) -> list[str]:
    return re.findall(r'^#{1,6} +(.+?) *#*$', prose(page), flags=re.M)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings, and those that the page sets itself."""
    result = set(re.findall(r'<a (?:name|id)="([^"]+)"', prose(page)))
    for heading in headings(page):
        plain = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading)
        base = re.sub(r'[^\w\- ]', '', plain.lower()).replace(' ', '-')
        numbered = (base if n == 0 else f'{base}-{n}' for n in range(100))
        result.add(next(anchor for anchor in numbered if anchor not in result))
    return result


def internal_links(page: Path) -> list[str]:
    """The targets of links and pictures that are not on the web."""
    return [t for t in _LINK.findall(prose(page)) if not re.match(r'\w+:', t)]
