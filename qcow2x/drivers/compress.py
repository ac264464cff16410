"""``compress``: everything that is written goes into compressed clusters."""

from __future__ import annotations

from qcow2x.drivers.errors import OptionError
from qcow2x.drivers.filter import FilterNode
from qcow2x.drivers.hooks import HookStorage
from qcow2x.drivers.options import Options
from qcow2x.storage import PyStorage


class CompressNode(FilterNode):
    driver = "compress"

    def open(self, options: Options) -> None:
        if self.below.driver != "qcow2":
            raise OptionError(
                f"Compression is not supported for underlying format: {self.below.driver}"
            )
        self.storage = PyStorage(HookStorage(self), self.writable)

    def _write(self, view: memoryview, offset: int, fua: bool) -> None:
        image = self.below.image
        assert image is not None
        unit = image.cluster_size
        end = offset + len(view)
        start, stop = offset - offset % unit, min(image.size, -(-end // unit) * unit)
        # Other writes to the same clusters between the read and the write would be lost.
        with self.writing:
            if (start, stop) != (offset, end):
                whole = memoryview(bytearray(stop - start))
                for edge in sorted({start, (stop - 1) - (stop - 1) % unit}):
                    self._read(whole[edge - start :][:unit], edge)
                whole[offset - start :][: len(view)] = view
                view = whole
            image.pwrite_compressed(view, start)
            if fua:
                image.flush()

    def _zero(self, offset: int, length: int, unmap: bool, fua: bool) -> None:
        with self.writing:
            super()._zero(offset, length, unmap, fua)
