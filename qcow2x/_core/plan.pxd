# The C side of plan.h for Cython. No .pyx: nothing to compile.
from libc.stdint cimport int32_t, uint64_t

from qcow2x._core.storage cimport q2_extent

cdef extern from "qcow2x/plan.h" nogil:
    enum:
        Q2_KIND_UNALLOCATED
        Q2_KIND_DATA
        Q2_KIND_ZERO
        Q2_KIND_COMPRESSED
        Q2_PLAN_MAX

    ctypedef struct q2_plan:
        int32_t n
        uint64_t nbytes
        q2_extent *extent
