"""What a program that embeds qcow2x does: requests straight to the core, without the GIL."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cimport qcow2x


cdef extern from "qcow2x/format.h" nogil:
    const uint32_t Q2_MAGIC


MAGIC = Q2_MAGIC


def is_image(qcow2x.Storage storage):
    """Whether the bytes are those of a guest disk, not of a file."""
    return isinstance(storage, qcow2x.CoreImage)


def read(qcow2x.Storage storage, uint64_t offset, size_t nbytes):
    """`nbytes` bytes at `offset`."""
    cdef bytearray answer = bytearray(nbytes)
    cdef uint8_t *buf = answer
    cdef qcow2x.q2_status status
    with nogil:
        status = storage.read_at(qcow2x.Q2_SITE_DATA_READ, buf, nbytes, offset)
    qcow2x.check_status(status, storage.name)
    return bytes(answer)


def write(qcow2x.Storage storage, uint64_t offset, const uint8_t[::1] data not None):
    """All of `data` at `offset`, durable when this returns."""
    cdef const uint8_t *buf = &data[0]
    cdef size_t nbytes = data.shape[0]
    cdef qcow2x.q2_status status
    with nogil:
        status = storage.write_at(qcow2x.Q2_SITE_DATA_WRITE, buf, nbytes, offset, qcow2x.WRITE_FUA)
        if status == qcow2x.Q2_OK:
            status = storage.sync(qcow2x.Q2_SITE_FLUSH)
    qcow2x.check_status(status, storage.name)
