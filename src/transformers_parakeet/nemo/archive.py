"""Reads and writes the container of a `.nemo` file: a tar archive of settings, weights and tokenizer files.

The YAML settings are parsed by `settings.py`; names and shapes of the weights are checked by `weights.py` and
`reader.py`.
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
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

SETTINGS = "model_config.yaml"
WEIGHTS = "model_weights.ckpt"

# NeMo writes about ten members
MAX_MEMBERS = 1000
# of a settings or tokenizer file; the largest in a released checkpoint has about 1 MB
MAX_TEXT_BYTES = 1 << 26
# uncompressed size divided by compressed size of a gzip archive; weights hardly compress
MAX_GZIP_RATIO = 20
# bytes read at a time from a gzip archive
CHUNK_BYTES = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"
# what torch and `zipfile` raise for a truncated or damaged file, or one of another format
DAMAGE_ERRORS = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError, OSError,
    ArithmeticError, MemoryError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
# a zip member starts with a header of 30 bytes, which ends with the lengths of the name and of the extra field
ZIP_HEADER_BYTES = 30
ZIP_HEADER_LENGTHS = struct.Struct("<26x2H")


class NemoError(ValueError):
    """A `.nemo` file cannot be read or written, or contains something that is not implemented."""


class Archive:
    """The members of a `.nemo` file by name. Nothing is extracted to disk, and weights are views of the mapped file.

    Args:
        path: a plain or gzip-compressed tar archive.

    Raises:
        FileNotFoundError: the file does not exist.
        NemoError: the file is not a readable archive.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"the file {path} does not exist")
        self.path = path
        # member name -> why it is not read
        self.ignored: dict[str, str] = {}
        try:
            self.buffer = open_buffer(path)
            self.content = memoryview(self.buffer.getbuffer() if isinstance(self.buffer, io.BytesIO) else self.buffer)
            self.tar = tarfile.open(fileobj=MemoryFile(self.content), mode="r:")  # noqa: SIM115  # opens no file
            self.members = self._list_members()
        except NemoError:
            raise
        except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, zlib.error) as error:
            raise NemoError(f"{path} is not a readable .nemo archive (plain or gzip tar): {error}") from error

    def _list_members(self) -> dict[str, tarfile.TarInfo]:
        """Return the tar headers of the regular files by name, and record in `self.ignored` why others are skipped.

        Raises:
            NemoError: the archive has too many members, two with the same name, or one that ends after the archive.
        """
        members: dict[str, tarfile.TarInfo] = {}
        for count, info in enumerate(self.tar):
            name = info.name.removeprefix("./")
            if count >= MAX_MEMBERS:
                raise NemoError(f"{self.path} has more than {MAX_MEMBERS} members: it is not a .nemo file")
            if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
                self.ignored[name] = "it is a link, a device, a folder or a sparse file"
            elif name.startswith("/") or ".." in PurePosixPath(name).parts:
                self.ignored[name] = "its name points outside the archive"
            elif name in members:
                raise NemoError(f"{self.path} has two members named {name!r}: save the file again")
            elif info.size < 0 or info.offset_data + info.size > len(self.content):
                raise NemoError(
                    f"{self.path} is truncated: {name!r} should have {info.size} bytes from byte {info.offset_data} "
                    f"on, but the archive has {len(self.content)} bytes; copy or download it again"
                )
            else:
                members[name] = info
        return members

    def _find_member(self, name: str) -> tarfile.TarInfo:
        """Return the tar header of a member.

        Raises:
            NemoError: the archive has no such member, or the member must not be read.
        """
        if name in self.ignored:
            raise NemoError(f"{self.path}: {name!r} is not read, because {self.ignored[name]}")
        if name not in self.members:
            names = ", ".join(sorted(self.members)[:20])
            raise NemoError(f"{self.path} has no member {name!r}; its members are: {names or 'none'}")
        return self.members[name]

    def read(self, name: str) -> bytes:
        """Return the content of a settings or tokenizer file.

        Args:
            name: name of the member, without a leading `./`.

        Raises:
            NemoError: there is no such member, or it is larger than `MAX_TEXT_BYTES`.
        """
        info = self._find_member(name)
        if info.size > MAX_TEXT_BYTES:
            raise NemoError(f"{self.path}: {name!r} has {info.size} bytes, at most {MAX_TEXT_BYTES} are read")
        return bytes(self.content[info.offset_data : info.offset_data + info.size])

    def read_artifact(self, reference: str) -> bytes:
        """Return the content of the file that a setting names, such as `nemo:<hash>_tokenizer.model`.

        Args:
            reference: value of the setting, with or without the prefix `nemo:`.

        Raises:
            NemoError: the archive has no such file.
        """
        return self.read(reference.removeprefix("nemo:"))

    def read_weights(self) -> dict[str, Tensor]:
        """Return the state dict under NeMo's names.

        The tensors are private (copy-on-write) views of the mapped file: their bytes are read from disk when they are
        first used, and a change stays in memory. Files that torch wrote before version 1.6 are copied into memory.

        Raises:
            NemoError: the file contains anything but plain dense tensors by name, or is damaged.
        """
        info = self._find_member(WEIGHTS)
        try:
            file: Any = MemoryFile(self.content[info.offset_data : info.offset_data + info.size])
            if not zipfile.is_zipfile(file):
                # torch before 1.6
                return load_tensors(file)
            records = list_zip_records(file)
            # fake tensors have a dtype, a shape and a position in the file, but no data
            with FakeTensorMode():
                fake_tensors = load_tensors(file)
            if any(checkpoint_offset(fake) is None for fake in fake_tensors.values()):
                warnings.warn(
                    "weights are copied, not mapped: torch before 2.7 does not tell their position in the file",
                    stacklevel=2,
                )
                return load_tensors(file)
            return {key: self._map_tensor(key, fake, info.offset_data, records) for key, fake in fake_tensors.items()}
        except NemoError as error:
            raise NemoError(f"{WEIGHTS} of {self.path}: {error}") from error
        except pickle.UnpicklingError as error:
            raise NemoError(
                f"{WEIGHTS} of {self.path} cannot be read as weights: it is damaged, or contains objects other than "
                "tensors, which are not loaded because they can run code"
            ) from error
        except DAMAGE_ERRORS as error:
            raise NemoError(f"{WEIGHTS} of {self.path} cannot be read as weights: {error}") from error

    def _map_tensor(self, key: str, fake: Tensor, checkpoint_start: int, records: Mapping[int, int]) -> Tensor:
        """Return a view of the mapped file as one tensor of the state dict.

        Args:
            key: name of the tensor, for errors.
            fake: a fake tensor (no data) with its dtype, shape, strides and offset in the checkpoint file.
            checkpoint_start: byte of the archive at which the checkpoint file starts.
            records: size in bytes of each record of the checkpoint file by its offset in that file.

        Returns:
            The tensor, contiguous and aligned. It is a copy if the file stores it with other strides or unaligned.
        """
        if not fake.dtype.is_floating_point and fake.dtype not in (torch.int64, torch.int32, torch.bool):
            raise NemoError(f"{key!r} is {fake.dtype}: quantised weights are not implemented, save them in float32")
        offset = checkpoint_offset(fake)
        assert offset is not None
        item_bytes, first_item = fake.element_size(), int(fake.storage_offset())
        if min((first_item, *fake.stride())) < 0 or fake.numel() == 0:
            raise NemoError(
                f"{key!r} has shape {list(fake.shape)} and strides {list(fake.stride())}: this is not a valid weight"
            )
        num_items = 1 + sum((size - 1) * stride for size, stride in zip(fake.shape, fake.stride(), strict=True))
        if (first_item + num_items) * item_bytes > records.get(offset, -1):
            raise NemoError(f"{key!r} of shape {list(fake.shape)} is larger than its record in the file")
        start = checkpoint_start + offset + first_item * item_bytes
        items = torch.frombuffer(self.content, dtype=fake.dtype, count=num_items, offset=start)
        tensor = items.as_strided(fake.shape, fake.stride()).contiguous()
        return tensor if tensor.data_ptr() % item_bytes == 0 else tensor.clone()

    def release_memory(self, tensor: Tensor) -> None:
        """Free the memory pages of an unchanged weight; the system reads them from the file again on the next use.

        It does nothing for a tensor outside the mapped file, or where the system has no `madvise`.

        Args:
            tensor: one of the tensors that `read_weights` returned.
        """
        if not isinstance(self.buffer, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
            return
        file_address = torch.frombuffer(self.content, dtype=torch.uint8).data_ptr()
        start, size = tensor.data_ptr() - file_address, tensor.numel() * tensor.element_size()
        if 0 <= start < len(self.content):
            page_start = start - start % mmap.PAGESIZE
            self.buffer.madvise(mmap.MADV_DONTNEED, page_start, start + size - page_start)


class MemoryFile(io.RawIOBase):
    """A read-only file over bytes in memory, which it does not copy.

    Args:
        content: the bytes.
    """

    def __init__(self, content: memoryview) -> None:
        self.content = content
        self.position = 0

    def readable(self) -> bool:
        """Return True: the file can be read."""
        return True

    def seekable(self) -> bool:
        """Return True: the file can be read in any order."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the read position.

        Args:
            offset: bytes from the origin.
            whence: origin, one of `io.SEEK_SET`, `io.SEEK_CUR` and `io.SEEK_END`.

        Returns:
            The new position in bytes from the start.
        """
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: len(self.content)}
        self.position = max(origins[whence] + offset, 0)
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Copy the next bytes into `buffer`, a writable bytes-like object, and return how many were copied."""
        chunk = self.content[self.position : self.position + len(buffer)]
        buffer[: len(chunk)] = chunk
        self.position += len(chunk)
        return len(chunk)


def open_buffer(path: Path) -> mmap.mmap | io.BytesIO:
    """Return the bytes of a tar archive: the mapped file, or the uncompressed content of a gzip file.

    Raises:
        NemoError: a gzip file has more than `MAX_GZIP_RATIO` times its size when it is uncompressed.
    """
    with path.open("rb") as file:
        if file.read(2) != GZIP_MAGIC:
            # private pages: a change of the model's weights does not change the file
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    max_bytes = MAX_GZIP_RATIO * path.stat().st_size + CHUNK_BYTES
    buffer = io.BytesIO()
    with gzip.open(path) as source:
        while chunk := source.read(CHUNK_BYTES):
            if buffer.tell() + len(chunk) > max_bytes:
                raise NemoError(
                    f"{path} has more than {MAX_GZIP_RATIO} times its size when uncompressed: it is not a .nemo file"
                )
            buffer.write(chunk)
    buffer.seek(0)
    return buffer


def list_zip_records(file: Any) -> dict[int, int]:
    """Return the size in bytes of each record of a torch checkpoint by the offset of its data.

    Args:
        file: the checkpoint, a zip archive of uncompressed records.

    Raises:
        NemoError: a record is compressed or big-endian, which torch does not write on common machines.
    """
    records: dict[int, int] = {}
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise NemoError(
                    f"the record {entry.filename!r} is compressed, torch writes it uncompressed: save the file again"
                )
            if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                raise NemoError("the weights are big-endian: save them on a little-endian machine")
            file.seek(entry.header_offset)
            name_bytes, extra_bytes = ZIP_HEADER_LENGTHS.unpack(file.read(ZIP_HEADER_BYTES))
            records[entry.header_offset + ZIP_HEADER_BYTES + name_bytes + extra_bytes] = entry.file_size
    return records


def checkpoint_offset(fake: Tensor) -> int | None:
    """Return the byte of the checkpoint file at which the storage of a fake tensor starts; None before torch 2.7."""
    return getattr(fake.untyped_storage(), "_checkpoint_offset", None)


def load_tensors(file: Any) -> dict[str, Tensor]:
    """Load a state dict with `torch.load(weights_only=True)` and refuse anything but dense tensors by name.

    Args:
        file: the checkpoint file; it is read from its start.

    Raises:
        NemoError: the file contains another object, or a sparse or quantised tensor.
    """
    file.seek(0)
    state_dict = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state_dict, dict):
        raise NemoError(f"the weights must be a dict of tensors by name, got {type(state_dict).__name__}")
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise NemoError(f"{key!r} must be a dense tensor, got {type(value).__name__}")
        if value.is_quantized:
            raise NemoError(f"{key!r} is {value.dtype}: quantised weights are not implemented, save them in float32")
    return dict(state_dict)


def write_archive(path: Path, files: Mapping[str, bytes], state_dict: Mapping[str, Tensor]) -> None:
    """Write a `.nemo` file. An existing file is replaced only after the new one is complete.

    Args:
        path: the file to write.
        files: content of the settings and tokenizer files by name.
        state_dict: the weights under NeMo's names; they are written one at a time, without a copy in memory.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("xb") as output:
            for name, content in files.items():
                output.write(tar_header(name, len(content)) + content)
                pad_to_block(output)
            write_weights(output, state_dict)
            # two empty blocks end a tar archive
            output.write(bytes(2 * tarfile.BLOCKSIZE))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_weights(output: BinaryIO, state_dict: Mapping[str, Tensor]) -> None:
    """Append the checkpoint file to a tar archive.

    The size of the checkpoint is known only after `torch.save`, so its tar header is written twice.
    """
    header_position = output.tell()
    output.write(tar_header(WEIGHTS, 0))
    start = output.tell()
    torch.save(dict(state_dict), output)
    size = output.tell() - start
    pad_to_block(output)
    end = output.tell()
    output.seek(header_position)
    output.write(tar_header(WEIGHTS, size))
    output.seek(end)


def tar_header(name: str, size: int) -> bytes:
    """Return the tar header of a member of `size` bytes."""
    info = tarfile.TarInfo(f"./{name}")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def pad_to_block(output: BinaryIO) -> None:
    """Write zeros up to the end of the current tar block of 512 bytes."""
    output.write(bytes(-output.tell() % tarfile.BLOCKSIZE))
