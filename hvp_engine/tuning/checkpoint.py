"""Checkpoints: written completely or not at all, with the previous one kept; read without running code; compared."""

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

from hvp_engine._support.arguments import unwrapped
from hvp_engine._support.torch_compat import pytree
from hvp_engine.errors import CheckpointError

FORMAT = "hvp_engine.Tuner"
VERSION = 1
"""The version of the state's layout. A change of the layout raises it by one and adds a migration."""

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""version -> function that upgrades a state of that version to the next; older files pass through all that follow."""


def previous(path: Path) -> Path:
    """Where the checkpoint before the newest is kept."""
    return path.with_name(path.name + ".previous")


def exists(path: Path) -> bool:
    """Whether there is a checkpoint to continue from."""
    return path.exists() or previous(path).exists()


def check_place(path: Path) -> None:
    """Create the folder; :class:`CheckpointError` if no checkpoint can be written there."""
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
    """Replace the checkpoint at `path`, which becomes the previous one. NumPy's numbers, such as learning rates taken
    from an array, are written as Python's.

    Whenever the process is killed, `path` or the previous checkpoint is complete.

    Errors: `OSError` if the disk refuses; :class:`CheckpointError` for a state that could not be read again. The
    existing checkpoints stay in both cases.
    """
    partial = _partial(path)
    state = pytree.tree_map(lambda leaf: leaf if isinstance(leaf, Tensor) else unwrapped(leaf), dict(state))
    try:
        with partial.open("wb") as file, _checksums():
            try:
                torch.save({"format": FORMAT, "version": VERSION, "state": state}, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # torch hides a failed write in its own error
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


def save(path: Path, state: Mapping[str, Any]) -> None:
    """:func:`write`, with a :class:`CheckpointError` wherever the file cannot be written."""
    check_place(path)
    try:
        write(path, state)
    except OSError as error:
        raise CheckpointError(
            f"{path}: expected a disk that takes the checkpoint; got {error}: make room, or save to another place"
        ) from error


def read(path: Path) -> dict[str, Any]:
    """The state in `path` or, with a warning, in the previous checkpoint if that file is damaged.

    Errors: :class:`CheckpointError` if neither can be read, or for a file that is no checkpoint or of a newer version.
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
    """A missing or damaged file."""


def _read(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:  # torch.load ignores the checksums
                raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # damaged data raises all kinds of errors
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


def check_fits(source: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """:class:`CheckpointError` unless the state `theirs` can be loaded into a tuner whose own state is `mine`."""
    if missing := mine.keys() - theirs.keys():
        raise CheckpointError(
            f"{source}: expected a complete checkpoint; got one without {', '.join(sorted(missing))}: use another file"
        )
    for part, what in (("weights", "weights"), ("hyper", "hyperparameters"), ("buffers", "buffers")):
        _compare_tensors(source, what, mine[part], theirs[part])
    for side in ("weight", "hyper"):
        ours, found = mine[f"{side}_side"], theirs[f"{side}_side"]
        for part in ("optimizer", "scheduler"):
            _compare(f"{source}: {side}_{part}", ours[f"{part}_type"], found[f"{part}_type"])
        groups = ([len(group["params"]) for group in one["optimizer"]["param_groups"]] for one in (ours, found))
        _compare(f"{source}: {side}_optimizer", *(f"groups of {sizes} tensors" for sizes in groups))
    _compare(f"{source}: estimator", mine["estimator_type"], theirs["estimator_type"])


_REMEDY = "build the Tuner as it was when the checkpoint was written, or use another file"


def _compare(name: str, expected: str, found: str) -> None:
    if expected != found:
        raise CheckpointError(f"{name}: expected {expected} as in this Tuner; got {found} in the checkpoint: {_REMEDY}")


def _compare_tensors(source: str, what: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """The same names, shapes and dtypes."""
    for name in mine.keys() ^ theirs.keys():
        where = "this Tuner lacks it" if name in theirs else "the checkpoint lacks it"
        raise CheckpointError(
            f"{source}: expected the checkpoint's {what} to be this Tuner's; got {name!r}, and {where}: {_REMEDY}"
        )
    for name, tensor in mine.items():
        other = theirs[name]
        for kind, expected, found in (
            ("shape", tuple(tensor.shape), tuple(other.shape)),
            ("dtype", tensor.dtype, other.dtype),
        ):
            if expected != found:
                raise CheckpointError(
                    f"{source}: expected {kind} {expected} of {what} {name!r} as in this Tuner; got {found}: {_REMEDY}"
                )


def compact(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy if it is part of a larger storage, all of which would be saved with it."""
    tensor = tensor.detach()
    return tensor if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize else tensor.clone()


def _partial(path: Path) -> Path:
    """Where a checkpoint is written first. The name is fixed, so that the next write replaces what a kill left."""
    return path.with_name(path.name + ".partial")


@contextmanager
def _checksums() -> Iterator[None]:
    """Makes torch.save write checksums even if the user has turned them off."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _sync_folder(folder: Path) -> None:
    """Make sure that the renames reach the disk."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
