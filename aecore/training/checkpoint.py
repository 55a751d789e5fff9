"""How far a fit has come, kept outside of the process that may die: safetensors and JSON, never a pickle."""

import hashlib
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from pyarrow import fs
from safetensors.numpy import load, save

Tensors = Mapping[str, np.ndarray]


class Checkpoints(NamedTuple):
    """The place of one stage's checkpoints: numbered pairs of files, of which the newest whole one counts.

    The weights are written first, the JSON with their checksum after them: what has a JSON that fits is whole, on
    object stores too, which cannot rename.
    """

    place: str
    """Folder or URI."""
    seconds: float
    """Least time between two checkpoints."""

    def load(self) -> tuple[dict[str, Any], Tensors] | None:
        """State and tensors of the newest whole checkpoint, or None. A damaged one is told and passed over."""
        files, path = self._open()
        for number in sorted(self._numbers(), reverse=True):
            try:
                with files.open_input_stream(f"{path}/{number:06}.json") as stream:
                    state = json.loads(stream.read())
                with files.open_input_stream(f"{path}/{number:06}.safetensors") as stream:
                    data = stream.read()
                if hashlib.sha256(data).hexdigest() == state.pop("sha256"):
                    return state, load(data)
                reason = "checksum differs"
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                reason = " ".join(str(error).split())[:100]
            warnings.warn(f"checkpoint {number} in {self.place} is damaged ({reason}): passed over", stacklevel=2)
        return None

    def save(self, number: int, state: Mapping[str, Any], tensors: Tensors) -> None:
        """Write checkpoint `number`, then remove the older ones. What cannot be written is told; training goes on."""
        files, path = self._open()
        data = save({name: np.asarray(value, order="C") for name, value in tensors.items()})
        try:
            files.create_dir(path, recursive=True)
            with files.open_output_stream(f"{path}/{number:06}.safetensors") as stream:
                stream.write(data)
            with files.open_output_stream(f"{path}/{number:06}.json") as stream:
                stream.write(json.dumps({**state, "sha256": hashlib.sha256(data).hexdigest()}).encode())
            for old in self._numbers():
                if old < number:
                    files.delete_file(f"{path}/{old:06}.json")
                    files.delete_file(f"{path}/{old:06}.safetensors")
        except OSError as error:
            reason = " ".join(str(error).split())[:120]
            warnings.warn(f"no checkpoint in {self.place} ({reason}): a crash now starts over", stacklevel=2)

    def clear(self) -> None:
        """Remove them all: the stage is finished. What cannot be removed is told, and stays."""
        files, path = self._open()
        try:
            if files.get_file_info(path).type != fs.FileType.NotFound:
                files.delete_dir(path)
        except OSError as error:
            reason = " ".join(str(error).split())[:120]
            warnings.warn(f"checkpoints stay in {self.place} ({reason}): they may be deleted", stacklevel=2)

    def clock(self) -> Iterator[bool]:
        """Whether a checkpoint is due, asked once an epoch."""
        last = time.monotonic()
        while True:
            due = time.monotonic() - last >= self.seconds
            last = time.monotonic() if due else last
            yield due

    def _open(self) -> tuple[fs.FileSystem, str]:
        if "://" in self.place:
            return fs.FileSystem.from_uri(self.place)
        return fs.LocalFileSystem(), self.place

    def _numbers(self) -> list[int]:
        files, path = self._open()
        found = files.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return [int(file.base_name[:-5]) for file in found if file.extension == "json"]
