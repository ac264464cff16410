from collections.abc import Callable, Container

from qcow2x._core.check import Checker
from qcow2x._core.storage import Storage
from qcow2x.types import FlagChange

STEP_NEW: int
STEP_LINK: int
STEP_ENTRIES: int
STEP_LOWER: int
STEP_CLEAN: int

class EntryFixer:
    def __init__(
        self,
        looked: Checker,
        view: Storage,
        write: Callable[[int, bytes, int], object],
        moved: dict[int, int],
        take_zeros: Callable[[], int] | None,
    ) -> None: ...
    def fix(self) -> None: ...

class RefcountFixer(Checker):
    flags_set: int
    flag_changes: list[FlagChange]
    def fix(
        self,
        write: Callable[[int, bytes, int], object],
        up: bool,
        down: bool,
        flags: bool,
        keep_out: Container[int],
    ) -> None: ...
