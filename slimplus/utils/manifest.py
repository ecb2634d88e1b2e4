"""manifest.json, which holds the size and the SHA-256 of every complete file of a run directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from slimplus.utils.errors import InputError
from slimplus.utils.files import remove, replace_folder, staging_folder, write_atomic

CHUNK = 2**20

Entry = dict[str, Any]


class Manifest:
    """List of the complete files below a folder; a file that is not listed is a leftover of a killed process.

    A file is listed once it has been written. While a listed file is replaced, the checksums of the old and of the new
    content are both listed, so that the file matches whenever the process is killed.

    Args:
        root: folder that holds manifest.json.

    Raises:
        InputError: if manifest.json is damaged.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.file = root, root / "manifest.json"
        self._entries: dict[str, list[Entry]] = {}
        if self.file.is_file():
            try:
                self._entries = json.loads(self.file.read_text())["files"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"run_dir: {self.file} is damaged ({error}), so the files beside it cannot be verified; "
                    "restore it, or give another run_dir"
                ) from error

    def create(self) -> None:
        """Write manifest.json if it does not exist, which marks the folder as a run directory."""
        if not self.file.is_file():
            self._save()

    def write(self, path: Path, content: bytes | str) -> None:
        """Write a file and list it; an equal file that is listed already is left alone."""
        data = content.encode() if isinstance(content, str) else content
        entry = _entry_of(data)
        if self._entries.get(self._key(path)) != [entry] or not path.is_file():
            self._replace({path: entry}, lambda: write_atomic(path, data))

    def replace_folder(self, folder: Path) -> None:
        """Put `staging_folder(folder)` in the place of `folder` and list its files."""
        staging = staging_folder(folder)
        entries = {folder / file.relative_to(staging): measure(file) for file in _files(staging)}
        for path in self._below(folder):
            if path not in entries:
                self._entries.pop(self._key(path))
        self._replace(entries, lambda: replace_folder(folder))

    def add(self, path: Path) -> None:
        """List an existing file, or all files of an existing folder, with their present content."""
        entries = {self._key(file): [measure(file)] for file in _files(path)}
        if self._entries != self._entries | entries:
            self._entries |= entries
            self._save()

    def forget(self, path: Path) -> None:
        """Strike a file, or all files of a folder, off the list, and remove it from the disk."""
        named = self._below(path)
        for each in named:
            self._entries.pop(self._key(each))
        if named:
            self._save()
        remove(path)

    def names(self, path: Path) -> bool:
        """Return whether a file, or any file of a folder, is listed, and so complete."""
        return bool(self._below(path))

    def problem(self, path: Path) -> str | None:
        """Return a sentence on what is wrong with a file or a folder, or None if its content is as it was written."""
        named = self._below(path)
        if not named:
            return f"{path} is not part of this run: {self.file.name} does not list it"
        for file in named:
            entries = self._entries[self._key(file)]
            if not file.is_file():
                return f"{file} is missing"
            if file.stat().st_size not in [entry["size"] for entry in entries]:
                return f"{file} has {file.stat().st_size:,} bytes instead of {entries[-1]['size']:,}"
            if measure(file) not in entries:
                return f"{file} differs from its checksum"
        return None

    def accepts(self, path: Path, data: bytes) -> bool:
        """Return whether `data`, read from a file, is what was written there."""
        return _entry_of(data) in self._entries.get(self._key(path), [])

    def named(self) -> list[Path]:
        """Return the paths of all listed files."""
        return [self.root / key for key in self._entries]

    def _replace(self, entries: dict[Path, Entry], replace: Callable[[], None]) -> None:
        """Call `replace`, which writes the files of `entries`; old and new content are listed while it runs."""
        before = {path: self._entries[self._key(path)] for path in entries if self._key(path) in self._entries}
        if before:
            for path, old in before.items():
                self._entries[self._key(path)] = [*old, entries[path]]
            self._save()
        replace()
        self._entries |= {self._key(path): [entry] for path, entry in entries.items()}
        self._save()

    def _below(self, path: Path) -> list[Path]:
        """Return `path` if it is listed, and the listed files below it."""
        key = self._key(path)
        return [self.root / name for name in self._entries if name == key or name.startswith(f"{key}/")]

    def _key(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _save(self) -> None:
        write_atomic(self.file, json.dumps({"files": self._entries}, indent=1) + "\n")


def _entry(size: int, digest: str) -> Entry:
    return {"size": size, "sha256": digest}


def _entry_of(data: bytes) -> Entry:
    return _entry(len(data), hashlib.sha256(data).hexdigest())


def measure(file: Path) -> Entry:
    """Return the manifest's entry of a file: its size in bytes and its SHA-256."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return _entry(file.stat().st_size, digest.hexdigest())


def _files(path: Path) -> Iterable[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
