"""Atomic writes: a file or a folder is either whole or absent, also after a crash or a power cut."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"
REPLACED_SUFFIX = ".replaced"


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a restart after a crash, finds the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def staging_folder(folder: Path) -> Path:
    """Return the temporary folder in which to write what `replace_folder` puts in the place of `folder`."""
    return folder.with_name(f".{folder.name}{TEMPORARY_SUFFIX}")


def replace_folder(folder: Path) -> None:
    """Put `staging_folder(folder)` in the place of `folder`; after a crash halfway, `clean` restores the old one."""
    staging, replaced = staging_folder(folder), folder.with_name(f".{folder.name}{REPLACED_SUFFIX}")
    for path in (*staging.rglob("*"), staging):
        sync_folder(path)
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
    staging.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def clean(root: Path) -> None:
    """Remove half-written files and folders of a killed process below `root`, and undo a half-done replacement."""
    for replaced in list(root.rglob(f".*{REPLACED_SUFFIX}")):
        folder = replaced.with_name(replaced.name.removeprefix(".").removesuffix(REPLACED_SUFFIX))
        if folder.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(folder)
    for leftover in list(root.rglob(f".*{TEMPORARY_SUFFIX}")):
        remove(leftover)


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Flush a file's content, or the renames inside a folder, to the disk, so that a power cut cannot undo them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
