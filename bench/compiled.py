"""Shared libraries that benchmarks compile here, once for each source, compiler and version."""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path


def load(source, *flags, version=""):
    """Compile a C++ source with `CXX` or g++ and load it, or raise ImportError."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(compiler[0]) is None:
        raise ImportError(f"{source.name} needs a C++ compiler; {compiler[0]} is not found")
    command = [*compiler, "-std=c++17", "-fPIC", "-shared", str(source), *flags]
    try:
        return ctypes.CDLL(_built(command, source, version))
    except OSError as error:
        raise ImportError(f"{source.name} does not load: {error}") from error


def _built(command, source, version):
    # The command is part of the key for its paths: environments must not share a binary.
    key = hashlib.sha256(
        repr((source.read_text(encoding="utf-8"), version, command)).encode()
    ).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"fastbn-bench-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ImportError(f"{folder} belongs to someone else; nothing is loaded from there")
    target = folder / f"{source.stem}-{key}.so"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}")
        built = subprocess.run([*command, "-o", unfinished], capture_output=True, text=True)
        if built.returncode:
            raise ImportError(f"{source.name} does not compile:\n{built.stderr}")
        unfinished.replace(target)  # in one go, lest another process load half a file
    return str(target)
