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

SETTINGS_FILE = "model_config.yaml"
WEIGHTS_FILE = "model_weights.ckpt"

# NeMo writes about ten members
MAX_MEMBERS = 1000
# largest accepted settings or tokenizer file; the largest one in a released checkpoint has about 1 MB
MAX_TEXT_BYTES = 1 << 26
# largest accepted ratio of uncompressed to compressed size of a gzip archive; weights hardly compress
MAX_GZIP_RATIO = 20
# number of bytes that are decompressed at a time
READ_CHUNK_BYTES = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"
# exceptions that torch and `zipfile` raise for a truncated or damaged file, or a file of another format
DAMAGE_ERRORS = (
    RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError, OSError,
    ArithmeticError, MemoryError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
# a zip member starts with a header of 30 bytes; its last two fields are the lengths of the name and the extra field
ZIP_HEADER_BYTES = 30
ZIP_HEADER_LENGTHS = struct.Struct("<26x2H")


class NemoError(ValueError):
    """A `.nemo` file cannot be read or written, or it contains an unsupported setting, weight or tokenizer."""


class Archive:
    """An open `.nemo` file. Nothing is extracted to disk, and the weights are views of the memory-mapped file.

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
        # name of an ignored member -> reason
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
        """Map the name of each regular file in the archive to its tar header.

        Links, devices, folders, sparse files and unsafe names are recorded in `self.ignored` with the reason.

        Raises:
            NemoError: the archive has too many members or two members with the same name, or it is truncated.
        """
        members: dict[str, tarfile.TarInfo] = {}
        for num_previous_members, info in enumerate(self.tar):
            name = info.name.removeprefix("./")
            if num_previous_members >= MAX_MEMBERS:
                raise NemoError(f"{self.path} has more than {MAX_MEMBERS} members: it is not a .nemo file")
            if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
                self.ignored[name] = "it is a link, a device, a folder or a sparse file"
            elif name.startswith("/") or ".." in PurePosixPath(name).parts:
                self.ignored[name] = "its name points outside the archive"
            elif name in members:
                raise NemoError(f"{self.path} has two members named {name!r}: save the file again")
            elif info.size < 0 or info.offset_data + info.size > len(self.content):
                raise NemoError(
                    f"{self.path} is truncated: {name!r} should have {info.size} bytes starting at byte "
                    f"{info.offset_data}, but the archive has {len(self.content)} bytes; copy or download it again"
                )
            else:
                members[name] = info
        return members

    def _find_member(self, name: str) -> tarfile.TarInfo:
        """Return the tar header of a member.

        Raises:
            NemoError: the archive has no member of this name, or the member is ignored for safety.
        """
        if name in self.ignored:
            raise NemoError(f"{self.path}: {name!r} is not read, because {self.ignored[name]}")
        if name not in self.members:
            names = ", ".join(sorted(self.members)[:20])
            raise NemoError(f"{self.path} has no member {name!r}; the members are: {names or 'none'}")
        return self.members[name]

    def read(self, name: str) -> bytes:
        """Return the content of a settings or tokenizer file.

        Args:
            name: name of the member, without a leading `./`.

        Raises:
            NemoError: the archive has no member of this name, or the member is larger than `MAX_TEXT_BYTES`.
        """
        info = self._find_member(name)
        if info.size > MAX_TEXT_BYTES:
            raise NemoError(f"{self.path}: {name!r} has {info.size} bytes, but at most {MAX_TEXT_BYTES} are allowed")
        return bytes(self.content[info.offset_data : info.offset_data + info.size])

    def read_artifact(self, reference: str) -> bytes:
        """Return the content of a tokenizer file that a setting refers to.

        Args:
            reference: value of the setting, such as `nemo:<hash>_tokenizer.model`; the prefix `nemo:` is optional.

        Raises:
            NemoError: the archive has no such file.
        """
        return self.read(reference.removeprefix("nemo:"))

    def read_weights(self) -> dict[str, Tensor]:
        """Return the state dict with NeMo's parameter names.

        The tensors are copy-on-write views of the memory-mapped file: the system reads their bytes from disk on first
        use, and in-place changes do not reach the file. Checkpoints from torch before 1.6 are copied into memory.

        Raises:
            NemoError: the checkpoint is damaged, or contains anything other than dense tensors.
        """
        info = self._find_member(WEIGHTS_FILE)
        try:
            checkpoint_file: Any = MemoryFile(self.content[info.offset_data : info.offset_data + info.size])
            if not zipfile.is_zipfile(checkpoint_file):
                # torch before 1.6 did not write zip files
                return load_tensors(checkpoint_file)
            records = list_zip_records(checkpoint_file)
            # fake tensors have a dtype, a shape and an offset in the file, but no data
            with FakeTensorMode():
                fake_tensors = load_tensors(checkpoint_file)
            if any(get_checkpoint_offset(fake) is None for fake in fake_tensors.values()):
                warnings.warn(
                    "weights are copied, not memory-mapped: torch before 2.7 does not provide their file offsets",
                    stacklevel=2,
                )
                return load_tensors(checkpoint_file)
            return {key: self._map_tensor(key, fake, info.offset_data, records) for key, fake in fake_tensors.items()}
        except NemoError as error:
            raise NemoError(f"{WEIGHTS_FILE} of {self.path}: {error}") from error
        except pickle.UnpicklingError as error:
            raise NemoError(
                f"{WEIGHTS_FILE} of {self.path} cannot be read as weights: the file is damaged, or contains objects "
                "other than tensors, which are not loaded because they could run code"
            ) from error
        except DAMAGE_ERRORS as error:
            raise NemoError(f"{WEIGHTS_FILE} of {self.path} cannot be read as weights: {error}") from error

    def _map_tensor(self, key: str, fake: Tensor, checkpoint_start: int, records: Mapping[int, int]) -> Tensor:
        """Create one tensor of the state dict as a view of the memory-mapped file.

        Args:
            key: name of the tensor, for error messages.
            fake: fake tensor (without data) that provides the dtype, shape, strides and offset in the checkpoint file.
            checkpoint_start: offset in bytes of the checkpoint file in the archive.
            records: offset of each record in the checkpoint file -> size of the record in bytes.

        Returns:
            A contiguous, aligned tensor. It is a copy if the stored tensor is not contiguous or not aligned.

        Raises:
            NemoError: the tensor is quantised, has an invalid shape, or does not fit into its record.
        """
        if not fake.dtype.is_floating_point and fake.dtype not in (torch.int64, torch.int32, torch.bool):
            raise NemoError(f"{key!r} is {fake.dtype}: quantised weights are not implemented, save them in float32")
        offset = get_checkpoint_offset(fake)
        assert offset is not None
        item_bytes, first_item = fake.element_size(), int(fake.storage_offset())
        if min((first_item, *fake.stride())) < 0 or fake.numel() == 0:
            raise NemoError(
                f"{key!r} has shape {list(fake.shape)} and strides {list(fake.stride())}: this is not a valid weight"
            )
        # distance from the first to the last item, plus one: shape (2, 3) with strides (5, 1) spans 1*5 + 2*1 + 1 = 8
        num_items = 1 + sum((size - 1) * stride for size, stride in zip(fake.shape, fake.stride(), strict=True))
        if (first_item + num_items) * item_bytes > records.get(offset, -1):
            raise NemoError(f"{key!r} of shape {list(fake.shape)} is larger than its record in the file")
        start = checkpoint_start + offset + first_item * item_bytes
        items = torch.frombuffer(self.content, dtype=fake.dtype, count=num_items, offset=start)
        tensor = items.as_strided(fake.shape, fake.stride()).contiguous()
        return tensor if tensor.data_ptr() % item_bytes == 0 else tensor.clone()

    def release_memory(self, tensor: Tensor) -> None:
        """Release the memory pages of an unchanged weight; the system reads them from the file again on the next use.

        Nothing happens if the tensor is not a view of the memory-mapped file, or if the system has no `madvise`.

        Args:
            tensor: one of the tensors that `read_weights` returned.
        """
        if not isinstance(self.buffer, mmap.mmap) or not hasattr(mmap, "MADV_DONTNEED"):
            return
        file_address = torch.frombuffer(self.content, dtype=torch.uint8).data_ptr()
        start, size = tensor.data_ptr() - file_address, tensor.numel() * tensor.element_size()
        if 0 <= start < len(self.content):
            # `madvise` requires an address at a page boundary
            page_start = start - start % mmap.PAGESIZE
            self.buffer.madvise(mmap.MADV_DONTNEED, page_start, start + size - page_start)


class MemoryFile(io.RawIOBase):
    """A read-only file object over bytes in memory, without a copy.

    Args:
        content: content of the file.
    """

    def __init__(self, content: memoryview) -> None:
        self.content = content
        self.position = 0

    def readable(self) -> bool:
        """Return True, because the file can be read."""
        return True

    def seekable(self) -> bool:
        """Return True, because the read position can be set."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the read position.

        Args:
            offset: number of bytes from the origin.
            whence: origin: `io.SEEK_SET` (start), `io.SEEK_CUR` (current position) or `io.SEEK_END` (end).

        Returns:
            The new position in bytes from the start of the file.
        """
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: len(self.content)}
        self.position = max(origins[whence] + offset, 0)
        return self.position

    def readinto(self, buffer: Any) -> int:
        """Copy the next bytes into `buffer`, a writable bytes-like object, and return the number of copied bytes.

        Args:
            buffer: writable bytes-like object.
        """
        chunk = self.content[self.position : self.position + len(buffer)]
        buffer[: len(chunk)] = chunk
        self.position += len(chunk)
        return len(chunk)


def open_buffer(path: Path) -> mmap.mmap | io.BytesIO:
    """Open a plain or gzip-compressed tar archive as bytes in memory.

    Args:
        path: path of the `.nemo` file.

    Returns:
        The memory-mapped file if it is not compressed, otherwise a buffer with the decompressed content.

    Raises:
        NemoError: the decompressed content is more than `MAX_GZIP_RATIO` times as large as the file.
    """
    with path.open("rb") as file:
        if file.read(2) != GZIP_MAGIC:
            # copy-on-write pages: in-place changes of the weights do not change the file
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    max_bytes = MAX_GZIP_RATIO * path.stat().st_size + READ_CHUNK_BYTES
    buffer = io.BytesIO()
    with gzip.open(path) as source:
        while chunk := source.read(READ_CHUNK_BYTES):
            if buffer.tell() + len(chunk) > max_bytes:
                raise NemoError(
                    f"{path} is more than {MAX_GZIP_RATIO} times larger when decompressed: it is not a .nemo file"
                )
            buffer.write(chunk)
    buffer.seek(0)
    return buffer


def list_zip_records(file: Any) -> dict[int, int]:
    """Map the offset of each record in a torch checkpoint to the size of the record in bytes.

    Args:
        file: checkpoint file, a zip archive of uncompressed records.

    Raises:
        NemoError: a record is compressed, or the weights are big-endian.
    """
    records: dict[int, int] = {}
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise NemoError(
                    f"the record {entry.filename!r} is compressed, but torch writes uncompressed records: save the "
                    "file again"
                )
            if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                raise NemoError("the weights are big-endian: save them on a little-endian machine")
            # the data follow the header, the name and the extra field
            file.seek(entry.header_offset)
            name_bytes, extra_bytes = ZIP_HEADER_LENGTHS.unpack(file.read(ZIP_HEADER_BYTES))
            records[entry.header_offset + ZIP_HEADER_BYTES + name_bytes + extra_bytes] = entry.file_size
    return records


def get_checkpoint_offset(fake: Tensor) -> int | None:
    """Return the offset in bytes of a fake tensor's storage in the checkpoint file; None before torch 2.7.

    Args:
        fake: tensor that `torch.load` created under `FakeTensorMode`.
    """
    return getattr(fake.untyped_storage(), "_checkpoint_offset", None)


def load_tensors(file: Any) -> dict[str, Tensor]:
    """Load a state dict with `torch.load(weights_only=True)` and check that all values are dense tensors.

    Args:
        file: checkpoint file; the read position is set to the start first.

    Raises:
        NemoError: the file does not contain a dict from names to tensors, or a tensor is sparse or quantised.
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
    """Write a `.nemo` file. An existing file is replaced only after the new file is complete.

    Args:
        path: path of the `.nemo` file.
        files: name of each settings or tokenizer file -> content of the file.
        state_dict: weights with NeMo's parameter names; they are written one at a time, without a copy in memory.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("xb") as output:
            for name, content in files.items():
                output.write(build_tar_header(name, len(content)) + content)
                pad_to_block(output)
            write_weights(output, state_dict)
            # two empty blocks end a tar archive
            output.write(bytes(2 * tarfile.BLOCKSIZE))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_weights(output: BinaryIO, state_dict: Mapping[str, Tensor]) -> None:
    """Append the weights to a tar archive as the member `model_weights.ckpt`.

    The size of the checkpoint is known only after `torch.save`, so the tar header is first written with size 0 and then
    overwritten.

    Args:
        output: tar archive, open for writing at its end.
        state_dict: weights with NeMo's parameter names.
    """
    header_position = output.tell()
    output.write(build_tar_header(WEIGHTS_FILE, 0))
    checkpoint_start = output.tell()
    torch.save(dict(state_dict), output)
    num_bytes = output.tell() - checkpoint_start
    pad_to_block(output)
    archive_end = output.tell()
    output.seek(header_position)
    output.write(build_tar_header(WEIGHTS_FILE, num_bytes))
    output.seek(archive_end)


def build_tar_header(name: str, size: int) -> bytes:
    """Build the tar header of a member with this name and size in bytes.

    Args:
        name: name of the member.
        size: size of the member in bytes.
    """
    info = tarfile.TarInfo(f"./{name}")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def pad_to_block(output: BinaryIO) -> None:
    """Pad a tar archive with zeros to a multiple of 512 bytes, the size of a tar block.

    Args:
        output: the archive, open for writing; its position is the end of the last member.
    """
    # `-n % 512` is the number of bytes from n to the next multiple of 512
    output.write(bytes(-output.tell() % tarfile.BLOCKSIZE))
