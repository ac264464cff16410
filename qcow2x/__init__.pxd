# The cimport surface: what an extension of someone else's may rely on. See tests/consumer for
# one that does. Compile with `include_dirs=[qcow2x.get_include()]`.
#
# Statuses are numbers; the words belong to this thread's last failure and become an exception
# in check_status, which needs the GIL: `check_status(status, storage.name)`.
from qcow2x._core.status cimport (
    q2_error,
    q2_status,
    Q2_OK,
    Q2_E_IO,
    Q2_E_NOSPC,
    Q2_E_NOMEM,
    Q2_E_CORRUPT,
    Q2_E_FORMAT,
    Q2_E_UNSUPPORTED,
    Q2_E_RANGE,
    Q2_E_READONLY,
    Q2_E_BROKEN,
    Q2_E_CLOSED,
    Q2_E_CODEC,
    Q2_E_LIMIT,
    Q2_E_PYTHON,
    Q2_E_ORDER,
    # The site of a guest's own request, the first argument of every method of Storage.
    Q2_SITE_DATA_READ,
    Q2_SITE_DATA_WRITE,
    Q2_SITE_FLUSH,
)
from qcow2x._core.errors cimport check_status, last_error
from qcow2x._core.storage cimport FileStorage, Storage, WRITE_FUA, ZERO_MAY_UNMAP
# An open image is a Storage whose bytes are the guest disk: every method of Storage, no GIL.
from qcow2x._core.image cimport CoreImage
