from qcow2x._core.crypto import SectorCipher
from qcow2x._core.storage import Storage

class LuksDisk(Storage):
    def __init__(self, below: Storage, cipher: SectorCipher, payload_offset: int) -> None: ...
