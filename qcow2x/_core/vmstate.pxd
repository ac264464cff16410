# The state of a machine, kept behind the disk: clusters below the L1 entries that the disk does not
# need. Section "Snapshots" (vm state size) of the format; where it begins is QEMU's choice.
from libc.stddef cimport size_t
from libc.stdint cimport uint64_t

from qcow2x._core.state cimport ImageState
from qcow2x._core.status cimport q2_status

# The guest offset at which it begins.
cdef uint64_t vmstate_at(ImageState img) noexcept nogil

# No lock held. Offsets count from there. What was never written is zeros. Q2_E_UNSUPPORTED where
# guest data lies in a file of its own, which ends with the disk.
cdef q2_status load_vmstate(ImageState img, void *buf, size_t nbytes, uint64_t off) noexcept nogil

# No lock held; one thread at a time. Makes the L1 table as long as it takes. Q2_E_LIMIT past what a
# table can reach.
cdef q2_status save_vmstate(ImageState img, const void *buf, size_t nbytes,
                            uint64_t off) noexcept nogil
