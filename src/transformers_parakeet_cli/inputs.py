"""Finds the recordings that the arguments of `parakeet transcribe` name, and the names of their outputs.

`outputs.py` writes the outputs.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sys
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STANDARD_INPUT = "-"
# endings of the files that are taken from a folder: audio, and video with an audio track
MEDIA_SUFFIXES = (
    *(".aac", ".aif", ".aiff", ".amr", ".au", ".caf", ".flac", ".m4a", ".m4b", ".mka", ".mp2", ".mp3", ".oga", ".ogg"),
    *(".opus", ".wav", ".weba", ".wma"),
    *(".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv"),
)


@dataclass(frozen=True)
class Recording:
    """A recording to transcribe.

    Args:
        name: path or URL, or `-` for standard input.
        folder: folder of the outputs relative to the output folder: the folder of the file, relative to the folder that
            the command line names. Empty for other files.
    """

    name: str
    folder: str = ""

    @property
    def source(self) -> Any:
        """What the library reads: the path, the URL, or the stream of standard input."""
        return sys.stdin.buffer if self.name == STANDARD_INPUT else self.name

    @property
    def label(self) -> str:
        """Name in messages and before texts; bytes of a path that are not UTF-8 are replaced."""
        if self.name == STANDARD_INPUT:
            return "standard input"
        return self.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    @property
    def file_name(self) -> str:
        """Name of the file without its folder."""
        if self.name == STANDARD_INPUT:
            return "stdin"
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.name).path) if is_url(self.name) else self.name
        return os.path.basename(path) or "audio"


def find_recordings(arguments: Sequence[str]) -> tuple[list[Recording], dict[str, str]]:
    """Find the recordings that the arguments name.

    A folder stands for all audio and video files in it and in its sub-folders, a pattern with `*`, `?` or `[` for all
    files that it matches. Files in a folder and of a pattern are sorted by name.

    Args:
        arguments: files, folders, patterns, URLs, and `-` for standard input.

    Returns:
        The recordings, each once, in the order of the arguments; and the error message for each argument that names no
        recording. A path that does not exist is a recording, because reading it gives the error.
    """
    recordings: dict[str, Recording] = {}
    errors: dict[str, str] = {}
    for argument in arguments:
        matches = list(find_matches(argument))
        if not matches:
            is_folder = os.path.isdir(argument)
            expected = "contain an audio or video file" if is_folder else "match a file"
            kind = "folder" if is_folder else "pattern"
            errors[argument] = f"the {kind} {argument} must {expected}, but there is none: correct the name"
        for recording in matches:
            recordings.setdefault(get_identity(recording.name), recording)
    return list(recordings.values()), errors


def find_matches(argument: str) -> Iterator[Recording]:
    """Yield the recordings that one argument names.

    Args:
        argument: file, folder, pattern, URL, or `-`.
    """
    if argument == STANDARD_INPUT or is_url(argument) or os.path.isfile(argument):
        yield Recording(argument)
    elif os.path.isdir(argument):
        for path in sorted(Path(argument).rglob("*")):
            if path.suffix.lower() in MEDIA_SUFFIXES and path.is_file():
                folder = path.parent.relative_to(argument).as_posix()
                yield Recording(str(path), "" if folder == "." else folder)
    elif glob.has_magic(argument):
        yield from (Recording(path) for path in sorted(glob.glob(argument, recursive=True)) if os.path.isfile(path))
    else:
        yield Recording(argument)


def is_url(name: str) -> bool:
    """Return whether a name is an http or https URL.

    Args:
        name: path or URL.
    """
    return name.lower().startswith(("http://", "https://"))


def get_identity(name: str) -> str:
    """Return a text that is equal for two names of the same recording.

    Args:
        name: path, URL, or `-`.
    """
    return name if name == STANDARD_INPUT or is_url(name) else os.path.realpath(name)


def choose_output_names(recordings: Sequence[Recording]) -> list[str]:
    """Choose a different name for the outputs of every recording.

    The name is the name of the file without its ending, such as `talk`. If several recordings have this name, each gets
    its full name, such as `talk.mp3`; if several have the same full name, each also gets a hash of its path, such as
    `talk.mp3-1f0c9a3e`. The names do not depend on the order of the recordings. Capital and small letters count as
    equal, because some file systems do not distinguish them.

    Args:
        recordings: the recordings.

    Returns:
        For each recording, the path of its outputs without ending, relative to the output folder.
    """
    candidates = [
        (
            os.path.join(recording.folder, os.path.splitext(recording.file_name)[0]),
            os.path.join(recording.folder, recording.file_name),
            os.path.join(recording.folder, f"{recording.file_name}-{hash_name(recording.name)}"),
        )
        for recording in recordings
    ]
    levels = [0] * len(recordings)
    while True:
        names = [candidate[level] for candidate, level in zip(candidates, levels, strict=True)]
        counts = Counter(name.casefold() for name in names)
        clashes = [index for index, name in enumerate(names) if counts[name.casefold()] > 1 and levels[index] < 2]
        if not clashes:
            return names
        for index in clashes:
            levels[index] += 1


def hash_name(name: str) -> str:
    """Return 8 hexadecimal digits that identify a recording.

    Args:
        name: path or URL.
    """
    return hashlib.sha256(get_identity(name).encode("utf-8", "surrogateescape")).hexdigest()[:8]


__all__ = ["MEDIA_SUFFIXES", "STANDARD_INPUT", "Recording", "choose_output_names", "find_recordings"]
