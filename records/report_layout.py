"""The layout of a run's reports: `label: value` lines, trees of them, tables with a total.

About 80 columns wide, for terminals and log files.
"""

import textwrap

from common.console_output import bold
from common.formatting import table

WIDTH = 80
VALUE_COLUMN = 25
THIN, THICK = '─' * WIDTH, '=' * WIDTH

_ACRONYMS = {'ffn': 'FFN', 'rope': 'RoPE', 'gqa': 'GQA', 'qk': 'QK', 'kv': 'KV'}
_SIZES = {'n_layer': 'Layers', 'n_head': 'Heads', 'n_embd': 'Width', 'd_ff': 'FFN Width'}


def label_of(key: str) -> str:
    """`position_encoding` → `Position Encoding`, `n_layer` → `Layers`."""
    words = (_ACRONYMS.get(word, word.capitalize()) for word in key.split('_'))
    return _SIZES.get(key) or ' '.join(words)


def field_line(label: str, value: str, branch: str = '') -> str:
    """One `label: value` line; a long value continues on the next lines, indented."""
    head = f'  {branch}{label}:'.ljust(VALUE_COLUMN - 1) + ' '
    rest = ('  │' if branch == '├─ ' else '').ljust(VALUE_COLUMN)
    return '\n'.join(
        textwrap.wrap(
            value,
            max(WIDTH, len(head) + 40),
            initial_indent=head,
            subsequent_indent=rest,
            break_long_words=False,
            break_on_hyphens=False,
        )
        or [head.rstrip()]
    )


def field_tree(fields: dict[str, str]) -> list[str]:
    last = len(fields) - 1
    return [
        field_line(label, value, '├─ ' if i < last else '└─ ')
        for i, (label, value) in enumerate(fields.items())
    ]


def total_table(
    title: str,
    columns: list[str],
    rows: dict[str, list[str]],
    below: dict[str, list[str]] | None = None,
) -> list[str]:
    """A tree with several right-aligned columns; the last row is their total, below the tree.

    below: rows under the total that are not part of it.
    """
    labels = [f'  {title}', *(f'  ├─ {label}' for label in rows)]
    labels[-1] = labels[-1].replace('├─', '  ')
    labels[-2] = labels[-2].replace('├─', '└─')
    labels += [f'  {label}' for label in below or {}]
    labels = [label.ljust(VALUE_COLUMN - 2) for label in labels]
    cells = [columns, *rows.values(), *(below or {}).values()]
    return numbers_table([[label, *row] for label, row in zip(labels, cells)])


def numbers_table(rows: list[list[str]]) -> list[str]:
    """Rows as lines: the first column flush left, the others flush right."""
    return table(rows, '<' + '>' * (len(rows[0]) - 1)).split('\n')


def report_text(title: str, sections: dict[str, list[str]]) -> str:
    """A title between rules, then each section below its heading."""
    lines = [THICK, bold(title), THICK]
    for heading, body in sections.items():
        lines += ['', bold(f'{heading}:'), *body]
    return '\n'.join([*lines, ''])
