# Consistency of a whole image: what every structure refers to against what the refcounts say.
# Works on the storage alone, past all caches, so whoever has the image open flushes first.
from qcow2x._core.header cimport Header
from qcow2x._core.storage cimport Storage

# Walks everything and answers a types.CheckResult whose counts are those of `qemu-img check`.
# repair: None, or "leaks" to lower refcounts that are too high; the storage must then be writable,
# and refcounts that others cache are stale afterwards. progress: types.Progress or None.
cpdef object check_storage(Storage storage, Header header, object repair=*, object progress=*)
