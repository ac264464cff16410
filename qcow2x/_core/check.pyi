from qcow2x._core.header import Header
from qcow2x._core.storage import Storage
from qcow2x.types import CheckResult, Progress

def check_storage(
    storage: Storage,
    header: Header,
    repair: str | None = None,
    progress: Progress | None = None,
) -> CheckResult: ...
