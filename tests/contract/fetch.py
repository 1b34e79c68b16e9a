"""An engine's newest wheel from PyPI, or that of a version asked for, without its dependencies; only its sources are unpacked."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).parents[2] / ".cache" / "contract"
"""Ignored by git; wheels stay here, and pip takes one that it finds."""

PYTHON = "3.12"
PLATFORMS = ("any", "manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in range(17, 43)))
"""Those that the engines are published for; the sources are the same."""


@dataclass(frozen=True)
class Wheel:
    """An unpacked wheel.

    Attributes:
        version: as its file name has it.
        folder: the package's folder.
    """

    version: str
    folder: Path


def fetch(package: str) -> Wheel:
    """An engine's sources: those of the version in CONTRACT_VLLM or CONTRACT_SGLANG, else the newest.

    Raises:
        RuntimeError: pip could not fetch it; the message has pip's reason.
    """
    pinned = os.environ.get(f"CONTRACT_{package.upper()}")
    wheel = _download(f"{package}=={pinned}" if pinned else package)
    version = wheel.name.split("-")[1]
    folder = CACHE / f"{package}-{version}"
    if not folder.is_dir():
        _unpack(wheel, package, folder)
    return Wheel(version, folder / package)


def _download(requirement: str) -> Path:
    CACHE.mkdir(parents=True, exist_ok=True)
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--python-version", PYTHON, *platforms,
        "--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--dest", str(CACHE), requirement,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # "Saved ./x.whl", or "File was already downloaded /…/x.whl"
    names = [Path(line.split()[-1]).name for line in done.stdout.splitlines() if line.endswith(".whl")]
    if done.returncode or not names:
        raise RuntimeError(f"pip download {requirement}: {done.stderr.strip() or done.stdout.strip()}")
    return CACHE / names[-1]


def _unpack(wheel: Path, package: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as unfinished, zipfile.ZipFile(wheel) as archive:
        sources = [name for name in archive.namelist() if name.startswith(f"{package}/") and name.endswith(".py")]
        archive.extractall(Path(unfinished) / "sources", sources)
        (Path(unfinished) / "sources").rename(folder)
