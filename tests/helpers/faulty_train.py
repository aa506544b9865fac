"""train.py with one fault at a known moment.

    faulty_train.py '{"iter": 3, "signal": "SIGTERM"}' --key=value …
    faulty_train.py '{"save": 4, "call": "rename", "nth": 1}' --key=value …

The first receives the signal once the journal has the line of batch 3. The second is killed at its
first os.rename while it saves the checkpoint of iteration 4.
"""

import json
import os
import signal
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

import train  # noqa: E402
from common.errors import run_script  # noqa: E402
from training.checkpoint import PendingCheckpoint  # noqa: E402
from training_logger import TrainingLogger  # noqa: E402


def signal_after(iter: int, name: str) -> None:
    original = TrainingLogger.iteration

    def iteration(self, entry):
        original(self, entry)
        if entry['iter'] == iter:
            os.kill(os.getpid(), getattr(signal, name))

    TrainingLogger.iteration = iteration


def kill_in_save(iter: int, call: str, nth: int) -> None:
    begin, original = PendingCheckpoint.__init__, getattr(os, call)
    left = None

    def counted_begin(self, folder, index, ranks):
        nonlocal left
        if index['iter'] == iter:
            left = nth
        begin(self, folder, index, ranks)

    def counted(*args, **kwargs):
        nonlocal left
        if left is not None:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    PendingCheckpoint.__init__ = counted_begin
    setattr(os, call, counted)


if __name__ == '__main__':
    fault = json.loads(sys.argv.pop(1))
    if 'save' in fault:
        kill_in_save(fault['save'], fault['call'], fault['nth'])
    else:
        signal_after(fault['iter'], fault['signal'])
    sys.argv[0] = str(PROJECT / 'train.py')
    run_script(train.main, sys.argv[1:])
