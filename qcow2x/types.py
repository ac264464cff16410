"""The plain values that qcow2x hands out. Offsets and lengths are bytes throughout.

All are named tuples: immutable, equal by value, ``_replace`` makes a changed copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

#: ``progress(done, total, phase)``: called from the thread that called the operation, about ten times
#: a second and at every percent, with ``done <= total`` in bytes. Return ``False`` to cancel; anything else goes on.
Progress = Callable[[int, int, str], object]


class Extent(NamedTuple):
    """A run of the guest disk whose bytes come from one place."""

    offset: int
    length: int
    #: Bytes are stored for this run (also True for a compressed one).
    data: bool
    #: The run reads as zeros.
    zero: bool
    compressed: bool
    #: 0 for the image itself, 1 for its backing file, and so on.
    depth: int
    #: Where in ``filename`` the run starts, or None where it has no plain place there.
    host_offset: int | None
    #: The layer that holds the run, or None where no layer does.
    filename: str | None

    @property
    def allocated(self) -> bool:
        """Whether some layer says what this run holds (``present`` in ``qemu-img map``)."""
        return self.filename is not None


class Reference(NamedTuple):
    """A file that an image names; handed to a ``references`` callable, which returns a source."""

    #: ``"backing"`` or ``"data-file"``.
    kind: str
    #: The name as it stands in the image.
    name: str
    #: The format the image gives for it, or None where it gives none.
    format: str | None
    #: The image that names it.
    referrer: str
    #: ``name`` resolved against the referrer's folder, or None where it is not a plain path.
    path: str | None


class ImageInfo(NamedTuple):
    """What ``qemu-img info`` tells of an image, typed."""

    filename: str
    format: str
    virtual_size: int
    #: Bytes the host gives to the file, or None where the storage cannot tell.
    actual_size: int | None
    cluster_size: int
    compat: str
    compression_type: str
    lazy_refcounts: bool
    refcount_bits: int
    corrupt: bool
    extended_l2: bool
    dirty: bool
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    data_file_raw: bool = False
    encryption: str | None = None
    snapshot_count: int = 0


class Finding(NamedTuple):
    """One thing that ``check`` found wrong."""

    #: ``"leak"``, ``"corruption"`` or ``"error"`` (a table that could not be read).
    kind: str
    #: Which structure: ``"refcount"``, ``"l1"``, ``"l2"``, ``"reftable"``, ``"header"`` ...
    structure: str
    #: Host offset of what is wrong.
    offset: int
    message: str
    #: Guest offset that it concerns, where one is known.
    guest_offset: int | None = None
    expected: int | None = None
    found: int | None = None
    #: Whether this run repaired it.
    fixed: bool = False
    #: What ``repair="all"`` does about it. In the result of a repair or of a dry run: what was or
    #: would be done, and None where it stays as it is.
    action: str | None = None
    #: What was found, in one word, which stays what it is: ``"leak"``, ``"l2-copied"`` ...
    code: str = ""
    #: Which one: of the entries of a table, of the refcount blocks, of the snapshots. (A tuple's own
    #: method of that name is of no use here.)
    index: int | None = None  # type: ignore[assignment]
    #: The refcount as it stands in the file, where an entry's COPIED flag does not match it.
    refcount: int | None = None
    #: Id and name of the snapshot that it concerns.
    subject: str | None = None


class FlagChange(NamedTuple):
    """A COPIED flag that a repair has set or cleared."""

    #: ``"l1"`` or ``"l2"``: the table that the entry stands in.
    structure: str
    #: Which entry of it. (A tuple's own method of that name is of no use here.)
    index: int  # type: ignore[assignment]
    guest_offset: int
    #: The entry as it was.
    entry: int
    #: The refcount of the cluster that it names, after the repair.
    refcount: int


class CheckResult(NamedTuple):
    """Counts as ``qemu-img check`` prints them, and the findings behind them."""

    filename: str
    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    #: The first :data:`MAX_FINDINGS` findings; the counts above are always whole.
    findings: Sequence[Finding] = ()
    #: After a repair: what is still wrong.
    left: Sequence[Finding] = ()
    #: After a repair: COPIED flags that were changed, :data:`MAX_FINDINGS` at most.
    flag_changes: Sequence[FlagChange] = ()
    #: After a repair: the refcounts were built anew, in another place. Then these are the clusters
    #: of the old ones, which are free now.
    rebuilt: bool = False
    released: Sequence[int] = ()
    cluster_size: int = 0

    MAX_FINDINGS = 10_000  # type: ignore[misc]

    @property
    def clean(self) -> bool:
        """No corruption, no leak and nothing that could not be checked is left."""
        return not (self.corruptions or self.leaks or self.check_errors)


class Stats(NamedTuple):
    """Counters of one open image since it was opened; memory in bytes as of now."""

    #: Metadata cache: bytes in use and the bound given by ``l2_cache_size``.
    l2_cache_bytes: int
    l2_cache_limit: int
    refcount_cache_bytes: int
    refcount_cache_limit: int
    l2_loads: int
    l2_evictions: int
    refcount_loads: int
    metadata_writes: int
    barriers: int
    dirty_slices: int
    clusters_allocated: int
    clusters_freed: int
    host_bytes_end: int
