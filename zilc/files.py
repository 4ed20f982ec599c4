"""Several files at once: all of them appear, or none."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from zilc import checkpoint, onnx_io
from zilc.errors import FileError

if TYPE_CHECKING:
    from zilc.pipeline import TrainingStep

HINT = "Check that the folder exists, is writable, and has room."


@contextlib.contextmanager
def together(*targets: str | os.PathLike[str]) -> Iterator[list[Path]]:
    """Stand-ins for files that belong together; they take their places when the block ends without an error.

    Each stand-in has its target's name in a hidden folder beside it, and whatever else is written there (external
    data) moves along.  An error that names a stand-in is raised again with the name of its target.

    Raises:
        FileError: a folder is missing or not writable, or the disk is full; nothing is left behind.
    """
    wanted = [Path(t) for t in targets]
    if len({p.absolute() for p in wanted}) < len(wanted):
        raise FileError("named twice, expected different files", where=str(wanted[0]))
    folders: list[Path] = []
    try:
        for target in wanted:
            if target.is_dir():
                raise FileError("is a folder, expected a file name", where=str(target))
            try:
                folders.append(Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)))
            except OSError as error:
                raise _unwritable(target, error) from error
        stand_ins = [folder / target.name for folder, target in zip(folders, wanted, strict=True)]
        try:
            yield stand_ins
        except FileError as error:
            for stand_in, target in zip(stand_ins, wanted, strict=True):
                if error.where and error.where.startswith(str(stand_in)):
                    where = str(target) + error.where[len(str(stand_in)) :]
                    raise FileError(error.what, where=where, hint=error.hint) from error
            raise
        for folder, target in zip(folders, wanted, strict=True):
            try:
                for made in sorted(folder.iterdir()):
                    os.replace(made, target.parent / made.name)
            except OSError as error:
                raise _unwritable(target, error) from error
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def _unwritable(target: Path, error: OSError) -> FileError:
    return FileError(f"cannot be written ({error.strerror or error})", where=str(target), hint=HINT)


def save_step(step: TrainingStep, graph: str | os.PathLike[str], state: str | os.PathLike[str] | None) -> None:
    """Write a training graph, and its initial state where ``state`` is a path.

    Raises:
        FileError: one of them cannot be written; neither is then.
    """
    base_dir = step.source.base_dir
    if state is None:
        with together(graph) as (graph_file,):
            onnx_io.save(step.model, graph_file, base_dir=base_dir)
        return
    with together(graph, state) as (graph_file, state_file):
        data = onnx_io.save(step.model, graph_file, base_dir=base_dir)
        checkpoint.save_state(state_file, step.state, checkpoint.graph_digest(data))
