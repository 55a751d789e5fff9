"""Checkpoints: the state of a fit, kept outside of the process that may die, as safetensors and JSON."""

import hashlib
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from pyarrow import fs
from safetensors.numpy import load, save

from aecore.data.files import filesystem_of, short_reason

Tensors = Mapping[str, np.ndarray]


class Checkpoints(NamedTuple):
    """The place of one stage's checkpoints: numbered pairs of files, of which the newest complete pair counts.

    The tensors are written first and the JSON with their checksum after them, so a pair whose JSON has the right
    checksum is complete. This holds on object stores too, which cannot rename files.
    """

    place: str
    """Folder or URI."""
    seconds: float
    """Least time between two checkpoints."""

    def load(self) -> tuple[dict[str, Any], Tensors] | None:
        """Return state and tensors of the newest complete checkpoint, or None; warn of damaged ones, and skip them."""
        files, path = filesystem_of(self.place, "resources.storage_path")
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
                reason = short_reason(error)
            warnings.warn(f"checkpoint {number} in {self.place} is damaged ({reason}): skipped", stacklevel=2)
        return None

    def save(self, number: int, state: Mapping[str, Any], tensors: Tensors) -> None:
        """Write checkpoint `number` and remove the older ones; warn if it cannot be written, so that training goes
        on."""
        files, path = filesystem_of(self.place, "resources.storage_path")
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
            message = f"no checkpoint can be written to {self.place} ({short_reason(error)}): a crash now starts over"
            warnings.warn(message, stacklevel=2)

    def clear(self) -> None:
        """Remove all checkpoints, since the stage is finished; warn if they cannot be removed."""
        files, path = filesystem_of(self.place, "resources.storage_path")
        try:
            if files.get_file_info(path).type != fs.FileType.NotFound:
                files.delete_dir(path)
        except OSError as error:
            message = f"checkpoints stay in {self.place} ({short_reason(error)}): they may be deleted"
            warnings.warn(message, stacklevel=2)

    def clock(self) -> Iterator[bool]:
        """Yield, once per epoch, whether a checkpoint is due."""
        last = time.monotonic()
        while True:
            due = time.monotonic() - last >= self.seconds
            last = time.monotonic() if due else last
            yield due

    def _numbers(self) -> list[int]:
        files, path = filesystem_of(self.place, "resources.storage_path")
        infos = files.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return [int(info.base_name[:-5]) for info in infos if info.extension == "json"]
