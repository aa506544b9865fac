"""From records to answers: runs, groups over seeds, statistics, tables. Imports no torch.

In a notebook: `from comparison import load_runs`.
"""

from comparison.run_list import RunList, load_runs

__all__ = ['RunList', 'load_runs']
