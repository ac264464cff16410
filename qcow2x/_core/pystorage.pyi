from qcow2x._core.storage import Storage

class PyStorage(Storage):
    def __init__(self, obj: object, writable: bool = False, cache: str = "writeback") -> None: ...
