"""KenLM's own programs, built from its pinned source release on PyPI.

The wheel on PyPI only asks questions of a model; the estimator `lmplz` stands in the same source release and is built here, once.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from softprune.errors import InputError, SoftpruneError

VERSION = "0.3.0"
SHA256 = "c4628bb9fb63c8a6f9240035b8b037385cfc404cb72e933cf48878291edac1e8"
_PROGRAMS = ("lmplz", "query")


class KenlmError(SoftpruneError):
    """KenLM cannot be fetched, built or run; the message holds the end of its own output."""


@dataclass(frozen=True)
class Kenlm:
    """The two programs.

    Attributes:
        lmplz: estimates a model with modified Kneser-Ney smoothing.
        query: scores text with it.
    """

    lmplz: Path
    query: Path


def run(command: Sequence[str | Path], **how: object) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and keep its output.

    Raises:
        KenlmError: it is not there, or it fails.
    """
    name = Path(command[0]).name
    try:
        done = subprocess.run(command, capture_output=True, text=True, **how)  # type: ignore[call-overload]
    except FileNotFoundError:
        raise KenlmError(f"{name}: found no such program; expected it on the search path") from None
    if done.returncode:
        tail = (done.stdout or "")[-1000:] + (done.stderr or "")[-2000:]
        raise KenlmError(f"{name}: found exit status {done.returncode}; expected 0. It said:\n{tail}")
    return done  # type: ignore[no-any-return]


def build(cache: Path) -> Kenlm:
    """Fetch and build KenLM below `cache`; at once if that was done before. Takes about a minute.

    It needs cmake, a C++ compiler, and Debian's zlib1g-dev and libboost-{program-options,system,thread,test}-dev.

    Raises:
        InputError: the release that was fetched is not the pinned one.
        KenlmError: fetching or building failed.
    """
    done = cache / f"kenlm-{VERSION}"
    if not all((done / name).exists() for name in _PROGRAMS):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _build(Path(folder), done)
    return Kenlm(*(done / name for name in _PROGRAMS))


def _build(folder: Path, done: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "kenlm", "--dest", str(folder)]
    run([*pip, f"kenlm=={VERSION}"])
    archive = folder / f"kenlm-{VERSION}.tar.gz"
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise InputError(archive.name, "SHA-256", found, SHA256)
    with tarfile.open(archive) as release:
        release.extractall(folder, filter="data")
    source, made = folder / f"kenlm-{VERSION}", folder / "made"
    # Newer CMake refuses the release's old minimum version.
    run(["cmake", "-S", source, "-B", made, "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_POLICY_VERSION_MINIMUM=3.5"])
    run(["cmake", "--build", made, "--parallel", str(os.cpu_count() or 1), "--target", *_PROGRAMS])
    done.mkdir(exist_ok=True)
    for name in _PROGRAMS:
        (made / "bin" / name).replace(done / name)
