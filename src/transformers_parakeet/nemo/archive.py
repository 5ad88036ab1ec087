"""The container of `.nemo` files: a tar of settings, weights and tokenizer files, read in place, written in one pass.

What settings and weights mean is for `nemo_settings.py` and `nemo.py`.
"""

import gzip
import io
import mmap
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

SETTINGS = "model_config.yaml"
WEIGHTS = "model_weights.ckpt"

# NeMo writes about ten members
MAX_MEMBERS = 1000
# bytes of a settings or tokenizer file; the largest released ones have about 1 MB
MAX_TEXT = 1 << 26
# a gzip archive may hold so many times its own size; weights hardly compress at all
MAX_GZIP_RATIO = 20
# of torch and of `zipfile` for files that are cut off, damaged, or something else
BROKEN = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError, OSError,
          ArithmeticError, MemoryError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile)  # fmt: skip


class NemoError(ValueError):
    """A `.nemo` file that cannot be read or written, or holds something that is not implemented."""


class Archive:
    """The members of a `.nemo` file by name. Nothing is extracted to disk; weights are views of the mapped file.

    Args:
        path: a plain or gzip tar.

    Raises:
        FileNotFoundError: there is no such file.
        NemoError: it is no readable archive.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        self.path = path
        # why a name that the archive has is not read
        self.ignored: dict[str, str] = {}
        try:
            self.buffer = open_buffer(path)
            self.view = memoryview(self.buffer.getbuffer() if isinstance(self.buffer, io.BytesIO) else self.buffer)
            self.tar = tarfile.open(fileobj=Window(self.view), mode="r:")  # noqa: SIM115  # holds no file
            self.members = self._regular_members()
        except NemoError:
            raise
        except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, zlib.error) as error:
            raise NemoError(f"{path} is not a readable .nemo archive (plain or gzip tar): {error}") from error

    def _regular_members(self) -> dict[str, tarfile.TarInfo]:
        """Return the plain files by name, after checking that they lie inside the archive."""
        members: dict[str, tarfile.TarInfo] = {}
        for count, info in enumerate(self.tar):
            name = info.name.removeprefix("./")
            if count >= MAX_MEMBERS:
                raise NemoError(f"{self.path} has more than {MAX_MEMBERS} members: it is no .nemo file")
            if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
                self.ignored[name] = "it is a link, a device, sparse or a folder"
            elif name.startswith("/") or ".." in PurePosixPath(name).parts:
                self.ignored[name] = "its name leads out of the archive"
            elif name in members:
                raise NemoError(f"{self.path} has two members named {name!r}: save the file again")
            elif info.size < 0 or info.offset_data + info.size > len(self.view):
                raise NemoError(
                    f"{self.path} is cut off: {name!r} claims {info.size} bytes from byte {info.offset_data} on, "
                    f"the archive has {len(self.view)}; copy or download it again"
                )
            else:
                members[name] = info
        return members

    def _member(self, name: str) -> tarfile.TarInfo:
        if name in self.ignored:
            raise NemoError(f"{self.path}: {name!r} is not read, because {self.ignored[name]}")
        if name not in self.members:
            held = ", ".join(sorted(self.members)[:20])
            raise NemoError(f"{self.path} has no member {name!r}; it holds {held or 'nothing'}")
        return self.members[name]

    def read(self, name: str) -> bytes:
        """Return the content of a settings or tokenizer file."""
        info = self._member(name)
        if info.size > MAX_TEXT:
            raise NemoError(f"{self.path}: {name!r} has {info.size} bytes, at most {MAX_TEXT} are read")
        return bytes(self.view[info.offset_data : info.offset_data + info.size])

    def artifact(self, reference: str) -> bytes:
        """Return the file that a YAML value such as `nemo:<hash>_tokenizer.model` refers to."""
        return self.read(reference.removeprefix("nemo:"))

    def weights(self) -> dict[str, Tensor]:
        """Return the state dict. Its tensors are private views of the file: no byte is read before it is used."""
        info = self._member(WEIGHTS)
        try:
            file: Any = Window(self.view[info.offset_data : info.offset_data + info.size])
            if not zipfile.is_zipfile(file):
                # written by torch before 1.6
                file.seek(0)
                return only_tensors(torch.load(file, map_location="cpu", weights_only=True))
            records = stored_records(file)
            file.seek(0)
            with FakeTensorMode():
                layout = only_tensors(torch.load(file, map_location="cpu", weights_only=True))
            if any(offset_of(fake) is None for fake in layout.values()):
                warnings.warn(
                    "weights are copied, not mapped: torch before 2.7 does not say where they lie", stacklevel=2
                )
                file.seek(0)
                return only_tensors(torch.load(file, map_location="cpu", weights_only=True))
            return {key: self._place(key, fake, info.offset_data, records) for key, fake in layout.items()}
        except NemoError as error:
            raise NemoError(f"{WEIGHTS} of {self.path}: {error}") from error
        except BROKEN as error:
            raise NemoError(f"{WEIGHTS} of {self.path} holds no weights: {error}") from error

    def _place(self, key: str, fake: Tensor, start: int, records: Mapping[int, int]) -> Tensor:
        """Return the tensor that a fake one describes, as a view of the file."""
        if not fake.dtype.is_floating_point and fake.dtype not in (torch.int64, torch.int32, torch.bool):
            raise NemoError(f"{key!r} is {fake.dtype}: quantised weights are not implemented, save them in float32")
        offset = offset_of(fake)
        assert offset is not None
        width, first = fake.element_size(), int(fake.storage_offset())
        if min((first, *fake.stride())) < 0 or fake.numel() == 0:
            raise NemoError(
                f"{key!r} has shape {list(fake.shape)} and strides {list(fake.stride())}: no weight has these"
            )
        count = 1 + sum((size - 1) * stride for size, stride in zip(fake.shape, fake.stride(), strict=True))
        if (first + count) * width > records.get(offset, -1):
            raise NemoError(f"{key!r} of shape {list(fake.shape)} does not lie in the file")
        position = start + offset + first * width
        flat = torch.frombuffer(self.view, dtype=fake.dtype, count=count, offset=position)
        tensor = flat.as_strided(fake.shape, fake.stride()).contiguous()
        return tensor if tensor.data_ptr() % width == 0 else tensor.clone()

    def release(self, tensor: Tensor) -> None:
        """Give the memory of an unchanged tensor back; it is read from the file again when it is used.

        Args:
            tensor: one of `weights()`.
        """
        base = torch.frombuffer(self.view, dtype=torch.uint8).data_ptr()
        start, size = tensor.data_ptr() - base, tensor.numel() * tensor.element_size()
        if (
            not isinstance(self.buffer, mmap.mmap)
            or not hasattr(mmap, "MADV_DONTNEED")
            or not 0 <= start < len(self.view)
        ):
            return
        page = start - start % mmap.PAGESIZE
        self.buffer.madvise(mmap.MADV_DONTNEED, page, start + size - page)


class Window(io.RawIOBase):
    """Bytes in memory as a file, without a copy of all of them."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.place = 0

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it can be read in any order."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a byte."""
        self.place = max(offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: len(self.view)}[whence], 0)
        return self.place

    def readinto(self, buffer: Any) -> int:
        """Copy the next bytes."""
        chunk = self.view[self.place : self.place + len(buffer)]
        buffer[: len(chunk)] = chunk
        self.place += len(chunk)
        return len(chunk)


def open_buffer(path: Path) -> mmap.mmap | io.BytesIO:
    """Return the bytes of a tar: the mapped file, or what a gzip file unpacks to."""
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            # private pages: a model may change its weights, the file stays as it is
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    limit = MAX_GZIP_RATIO * path.stat().st_size + (1 << 20)
    buffer = io.BytesIO()
    with gzip.open(path) as source:
        while chunk := source.read(1 << 20):
            if buffer.tell() + len(chunk) > limit:
                raise NemoError(f"{path} unpacks to more than {MAX_GZIP_RATIO} times its size: it is no .nemo file")
            buffer.write(chunk)
    buffer.seek(0)
    return buffer


def stored_records(file: Any) -> dict[int, int]:
    """Return the sizes of the records of a torch file by their offset, refusing what torch does not write."""
    records: dict[int, int] = {}
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise NemoError(
                    f"the record {entry.filename!r} is compressed, torch writes it plain: save the file again"
                )
            if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                raise NemoError("the weights are big-endian: save them on a little-endian machine")
            file.seek(entry.header_offset)
            # local header: 26 bytes, then the lengths of name and extra field, then both of these
            name, extra = struct.unpack("<26x2H", file.read(30))
            records[entry.header_offset + 30 + name + extra] = entry.file_size
    return records


def offset_of(fake: Tensor) -> int | None:
    """Return where in its file torch found a tensor that it loaded without its values; `None` before torch 2.7."""
    return getattr(fake.untyped_storage(), "_checkpoint_offset", None)


def only_tensors(state: Any) -> dict[str, Tensor]:
    """Return a state dict as a dict, refusing anything else."""
    if not isinstance(state, dict):
        raise NemoError(f"it must hold tensors by name, it holds {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise NemoError(f"{key!r} is {type(value).__name__}: expected only dense tensors by name")
        if value.is_quantized:
            raise NemoError(f"{key!r} is {value.dtype}: quantised weights are not implemented, save them in float32")
    return dict(state)


def write_archive(path: Path, files: Mapping[str, bytes], state: Mapping[str, Tensor]) -> None:
    """Write a `.nemo` file; an existing one is replaced only when the new one is complete.

    Args:
        path: the file.
        files: content of the settings and tokenizer files by name.
        state: the weights, written one after the other.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as out:
            for name, content in files.items():
                out.write(header(name, len(content)) + content)
                pad(out)
            place = out.tell()
            out.write(header(WEIGHTS, 0))
            start = out.tell()
            torch.save(dict(state), out)
            size = out.tell() - start
            pad(out)
            # the end of a tar: two empty blocks
            out.write(bytes(2 * tarfile.BLOCKSIZE))
            out.seek(place)
            out.write(header(WEIGHTS, size))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def header(name: str, size: int) -> bytes:
    """Return the tar header of a member."""
    info = tarfile.TarInfo(f"./{name}")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def pad(out: Any) -> None:
    """Fill the last block of a member with zeros."""
    out.write(bytes(-out.tell() % tarfile.BLOCKSIZE))
