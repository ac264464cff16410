# cython: language_level=3
"""The heavy loops of image-to-image work: zero detection, comparison, batch compression.

Every function takes buffer-protocol objects, copies nothing and holds no GIL while it works, so a
pool of ordinary Python threads runs them side by side.
"""
from cpython.buffer cimport (PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer)
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint8_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memset

import array

from qcow2x._core.codec cimport encode_cluster
from qcow2x._core.codec cimport max_level as codec_max_level
from qcow2x._core.codec cimport min_level as codec_min_level
from qcow2x._core.errors cimport check_status
from qcow2x._core.status cimport Q2_INCOMPRESSIBLE, Q2_OK, q2_status


cdef bint all_zero(const uint8_t *buf, size_t nbytes) noexcept nogil:
    # The first bytes by hand, the rest by comparing the buffer with itself shifted by sixteen:
    # memcmp is the fastest loop the C library has, and most data fails in the first bytes.
    cdef size_t i
    cdef size_t head = nbytes if nbytes < 16 else 16
    for i in range(head):
        if buf[i]:
            return False
    return nbytes <= 16 or memcmp(buf, buf + 16, nbytes - 16) == 0


def is_zero(buffer) -> bool:
    """Whether every byte of *buffer* is zero (True for an empty one)."""
    cdef Py_buffer view
    cdef bint answer
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            answer = all_zero(<const uint8_t *>view.buf, <size_t>view.len)
        return answer
    finally:
        PyBuffer_Release(&view)


def fill_zero(buffer) -> None:
    """Set every byte of the writable *buffer* to zero."""
    cdef Py_buffer view
    PyObject_GetBuffer(buffer, &view, PyBUF_WRITABLE)
    try:
        with nogil:
            memset(view.buf, 0, <size_t>view.len)
    finally:
        PyBuffer_Release(&view)


def first_difference(left, right) -> int | None:
    """Index of the first byte in which two buffers of one length differ, or None.

    Raises ValueError when the lengths differ.
    """
    cdef Py_buffer a, b
    cdef const uint8_t *p
    cdef const uint8_t *q
    cdef size_t nbytes, at = 0, step
    PyObject_GetBuffer(left, &a, PyBUF_SIMPLE)
    try:
        PyObject_GetBuffer(right, &b, PyBUF_SIMPLE)
        try:
            if a.len != b.len:
                raise ValueError(f"buffers differ in length: {a.len} and {b.len}")
            nbytes = <size_t>a.len
            p = <const uint8_t *>a.buf
            q = <const uint8_t *>b.buf
            with nogil:
                # Whole pages by memcmp; only the page that differs is walked byte by byte.
                while at < nbytes:
                    step = nbytes - at if nbytes - at < 4096 else 4096
                    if memcmp(p + at, q + at, step):
                        while p[at] == q[at]:
                            at += 1
                        break
                    at += step
            return at if at < nbytes else None
        finally:
            PyBuffer_Release(&b)
    finally:
        PyBuffer_Release(&a)


def first_nonzero(buffer) -> int | None:
    """Index of the first byte of *buffer* that is not zero, or None."""
    cdef Py_buffer view
    cdef const uint8_t *p
    cdef size_t nbytes, at = 0, step
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        nbytes = <size_t>view.len
        p = <const uint8_t *>view.buf
        with nogil:
            while at < nbytes:
                step = nbytes - at if nbytes - at < 4096 else 4096
                if not all_zero(p + at, step):
                    while p[at] == 0:
                        at += 1
                    break
                at += step
        return at if at < nbytes else None
    finally:
        PyBuffer_Release(&view)


def zero_map(buffer, size_t block) -> bytes:
    """One byte per *block* bytes of *buffer*: 1 where the block is all zeros, else 0.

    The last block may be short. Raises ValueError when *block* is 0.
    """
    cdef Py_buffer view
    cdef size_t nbytes, i, n, length
    cdef const uint8_t *p
    cdef uint8_t *out
    if block == 0:
        raise ValueError("block must be at least 1")
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    try:
        nbytes = <size_t>view.len
        n = (nbytes + block - 1) // block
        answer = bytes(n)
        out = <uint8_t *><char *>answer
        p = <const uint8_t *>view.buf
        with nogil:
            for i in range(n):
                length = block if nbytes - i * block >= block else nbytes - i * block
                out[i] = all_zero(p + i * block, length)
        return answer
    finally:
        PyBuffer_Release(&view)


def data_runs(buffer, size_t block, size_t min_zero) -> list:
    """The runs of *buffer* worth writing, as ``[(start, length)]`` in rising order.

    The buffer is looked at in blocks of *block* bytes; a run of zero blocks is left out when it
    spans at least *min_zero* bytes or reaches to the end of the buffer from its start. Raises
    ValueError when *block* is 0.
    """
    cdef Py_buffer view
    cdef size_t nbytes, i, n, length
    cdef const uint8_t *p
    cdef uint8_t *zeros
    cdef size_t run_start, zero_start, end
    if block == 0:
        raise ValueError("block must be at least 1")
    PyObject_GetBuffer(buffer, &view, PyBUF_SIMPLE)
    zeros = NULL
    try:
        nbytes = <size_t>view.len
        n = (nbytes + block - 1) // block
        zeros = <uint8_t *>malloc(n if n else 1)
        if zeros == NULL:
            raise MemoryError
        p = <const uint8_t *>view.buf
        with nogil:
            for i in range(n):
                length = block if nbytes - i * block >= block else nbytes - i * block
                zeros[i] = all_zero(p + i * block, length)
        runs = []
        i = 0
        run_start = 0
        while i < n:
            if not zeros[i]:
                i += 1
                continue
            zero_start = i
            while i < n and zeros[i]:
                i += 1
            end = nbytes if i == n else i * block
            if end - zero_start * block >= min_zero or (zero_start == 0 and i == n):
                if zero_start * block > run_start:
                    runs.append((run_start, zero_start * block - run_start))
                run_start = end
        if run_start < nbytes:
            runs.append((run_start, nbytes - run_start))
        return runs
    finally:
        free(zeros)
        PyBuffer_Release(&view)


def level_range(uint32_t compression_type) -> tuple:
    """Lowest and highest compression level of a type (0 zlib, 1 zstd)."""
    return codec_min_level(compression_type), codec_max_level(compression_type)


def compress_batch(buffer, size_t cluster_size, uint32_t compression_type, int32_t level, out):
    """Encode the clusters of *buffer* one after another into the writable buffer *out*.

    The length of *buffer* must be a multiple of *cluster_size*; *out* needs as much room as
    *buffer*. Returns ``(used, sizes)``: bytes filled in *out* and an ``array('I')`` with the
    encoded size of each cluster, 0 where encoding would not make it smaller. The answer depends on
    the bytes, type and level only. Raises ValueError for lengths that do not fit.
    """
    cdef Py_buffer src, dst
    cdef size_t i, n, used = 0, got = 0
    cdef q2_status status = Q2_OK
    cdef uint32_t *sizes_ptr
    cdef Py_buffer sizes_view
    if cluster_size == 0:
        raise ValueError("cluster_size must be at least 1")
    PyObject_GetBuffer(buffer, &src, PyBUF_SIMPLE)
    try:
        if <size_t>src.len % cluster_size:
            raise ValueError(f"{src.len} bytes are not whole clusters of {cluster_size}")
        n = <size_t>src.len // cluster_size
        sizes = array.array("I", bytes(4 * n))
        PyObject_GetBuffer(out, &dst, PyBUF_WRITABLE)
        try:
            if dst.len < src.len:
                raise ValueError(f"out has room for {dst.len} bytes, {src.len} are needed")
            PyObject_GetBuffer(sizes, &sizes_view, PyBUF_WRITABLE)
            try:
                sizes_ptr = <uint32_t *>sizes_view.buf
                with nogil:
                    for i in range(n):
                        status = encode_cluster(
                            compression_type, level,
                            <const uint8_t *>src.buf + i * cluster_size, cluster_size,
                            <uint8_t *>dst.buf + used, cluster_size - 1, &got)
                        if status == Q2_OK:
                            sizes_ptr[i] = <uint32_t>got
                            used += got
                        elif status == Q2_INCOMPRESSIBLE:
                            sizes_ptr[i] = 0
                            status = Q2_OK
                        else:
                            break
            finally:
                PyBuffer_Release(&sizes_view)
        finally:
            PyBuffer_Release(&dst)
    finally:
        PyBuffer_Release(&src)
    check_status(status, "compression")
    return used, sizes
