"""Checkpoint files: written all at once or not at all, the previous one kept, read without running code."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvp_engine.errors import CheckpointError

FORMAT = "hvp_engine.Tuner"
VERSION = 1
"""Of the state. What changes it raises this by one, and adds to `MIGRATIONS`."""

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""By version, what makes of a state of it one of the version after it; every older file is read by way of these."""


def previous(path: Path) -> Path:
    """Where the checkpoint before the newest is kept."""
    return path.with_name(path.name + ".previous")


def exists(path: Path) -> bool:
    """Whether there is anything to continue from."""
    return path.exists() or previous(path).exists()


def check_place(path: Path) -> None:
    """Make the folder; :class:`CheckpointError` if no checkpoint can be written there."""
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with _partial(path).open("wb"):
            pass
        _partial(path).unlink()
    except OSError as error:
        raise CheckpointError(f"checkpoint: expected a file that can be written; got {path}: {error}") from error


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Replace the checkpoint at `path`; the one there becomes the previous one.

    Whenever the process is killed, `path` or the previous one is complete.

    Errors: `OSError` if the disk refuses, :class:`CheckpointError` for a state that could not be read again; either
    leaves the checkpoints that were there.
    """
    partial = _partial(path)
    try:
        with partial.open("wb") as file, _checksums():
            try:
                torch.save({"format": FORMAT, "version": VERSION, "state": dict(state)}, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # torch's own error for a write that failed
                    raise error.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())
        try:
            torch.load(partial, weights_only=True, mmap=True, map_location="cpu")  # does not read the tensors
        except Exception as error:
            raise CheckpointError(
                f"{path}: expected a state of tensors and plain values; got one that cannot be read again ({error}): "
                "the state_dict of an optimizer, scheduler, loader or estimator holds objects of other types"
            ) from error
        if path.exists():
            os.replace(path, previous(path))
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def read(path: Path) -> dict[str, Any]:
    """The newest state that is whole: of `path`, else, with a warning, the previous one.

    Errors: :class:`CheckpointError` if neither can be read, or for a file of something else or of a newer version.
    """
    try:
        return _read(path)
    except _UnreadableError as error:
        fallback = previous(path)
        if not fallback.exists():
            raise CheckpointError(f"{error}: pass another file, or delete this one to begin again") from error
        try:
            state = _read(fallback)
        except _UnreadableError as second:
            raise CheckpointError(f"{error}; {second}: delete both to begin again") from second
        warnings.warn(f"{error}; going on from the checkpoint before it, {fallback}", stacklevel=4)
        return state


class _UnreadableError(Exception):
    """No whole checkpoint here."""


def _read(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:  # torch.load does not look at the checksums
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # what damaged data raises has no common class
        reason = " ".join(str(error).split())[:200]
        raise _UnreadableError(f"{path}: expected a whole checkpoint; got {type(error).__name__}: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: expected a checkpoint of a Tuner; got a file of something else: pass the path that was given "
            "to Tuner.fit"
        )
    version, state = content.get("version"), content["state"]
    if version not in (*MIGRATIONS, VERSION):
        raise CheckpointError(
            f"{path}: expected format version {VERSION}; got {version}, written by a newer version: update hvp_engine"
        )
    for older in range(version, VERSION):
        state = MIGRATIONS[older](state)
    return state


def compare_tensors(source: str, what: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """:class:`CheckpointError` unless both have the same names, shapes and dtypes."""
    remedy = "build the Tuner as it was when the checkpoint was written, or use another file"
    for name in mine.keys() ^ theirs.keys():
        where = "this Tuner lacks it" if name in theirs else "the checkpoint lacks it"
        raise CheckpointError(
            f"{source}: expected the checkpoint's {what} to be this Tuner's; got {name!r}, and {where}: {remedy}"
        )
    for name, tensor in mine.items():
        for property in ("shape", "dtype"):
            expected, found = getattr(tensor, property), getattr(theirs[name], property)
            if expected != found:
                shown = (tuple(expected), tuple(found)) if property == "shape" else (expected, found)
                raise CheckpointError(
                    f"{source}: expected {property} {shown[0]} of {what} {name!r} as in this Tuner; got {shown[1]}: "
                    f"{remedy}"
                )


def compact(tensor: Tensor) -> Tensor:
    """`tensor` as it is, or a copy if it is a part of a larger storage, which would be saved whole."""
    tensor = tensor.detach()
    return tensor if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize else tensor.clone()


def _partial(path: Path) -> Path:
    """Where a checkpoint is written first; one name, so that what a killed process leaves is overwritten."""
    return path.with_name(path.name + ".partial")


@contextmanager
def _checksums() -> Iterator[None]:
    """torch.save with true checksums, which a setting can turn off."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _sync_folder(folder: Path) -> None:
    """Make the renames themselves last."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
