from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor


class Scratch:
    """Tensors in temporary files, mapped into memory: what of them is in use is read, and nothing has to stay.

    Mapped tensors outlive the files' names, which go when the scratch is left.

    Args:
        beside: the file that is made with it; the temporary ones lie in a folder next to it.
    """

    def __init__(self, beside: str | os.PathLike[str]) -> None:
        self._target = Path(os.path.realpath(beside))  # a link stays one
        if self._target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder: name a file in it", os.fspath(beside))
        self._made: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0

    @property
    def folder(self) -> Path:
        """Made when it is first asked for.

        Raises:
            OSError: there is no room for it, or no folder to put it into.
        """
        if self._made is None:
            # On Windows the files of tensors that are still mapped cannot be deleted.
            self._made = tempfile.TemporaryDirectory(
                prefix=f".{self._target.name}.", dir=self._target.parent, ignore_cleanup_errors=True
            )
        return Path(self._made.name)

    def put(self, tensor: Tensor) -> Tensor:
        """The same numbers on the CPU, in a file; changes of them stay in memory."""
        if tensor.numel() == 0:
            return tensor.cpu()
        path = self.folder / f"{self._count}.numbers"
        self._count += 1
        try:
            with path.open("wb") as file:
                file.write(tensor.detach().cpu().contiguous().numpy().data)
        except OSError as error:
            message = f"{error.strerror} (a layer's directions or statistics, {tensor.nbytes} bytes): make room there"
            raise OSError(error.errno, message, str(path)) from error
        mapped = torch.from_file(str(path), shared=False, size=tensor.numel(), dtype=tensor.dtype, device="cpu")
        return mapped.view(tensor.shape)

    def __enter__(self) -> Scratch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._made is not None:
            self._made.cleanup()
