from qcow2x._core.header import Header
from qcow2x._core.storage import Storage
from qcow2x.types import CheckResult, Finding, Progress

MAX_COUNTER_BYTES: int

class Checker:
    l1_tables: list[tuple[int, int, bool]]
    shared_l2: set[int]
    shared_l1: set[int]
    disk_l1_shared: bool
    missing_blocks: list[int]
    used_blocks: set[int]
    rt_shared: bool
    storage: Storage
    header: Header
    def __init__(
        self,
        storage: Storage,
        header: Header,
        progress: Progress | None = None,
        phase: str = "check",
        max_counter_bytes: int = ...,
    ) -> None: ...
    def check(self) -> Checker: ...
    def findings(self) -> list[Finding]: ...
    def result(self) -> CheckResult: ...
    def refcount_table(self) -> list[tuple[int, bool]]: ...
    @property
    def wrong_flags(self) -> int: ...
    @property
    def refcounts_lost(self) -> bool: ...
    @property
    def refs_hidden(self) -> bool: ...
    @property
    def refs_uncertain(self) -> bool: ...
    @property
    def end_of_use(self) -> int: ...
