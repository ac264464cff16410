"""Anything a guest or its manager can do, in any order, on every shape of image, against a plain bytearray.

After every run the whole chain is clean for ``qemu-img check``, QEMU reads the model's bytes from it,
and backing files hold what they held. ``--hypothesis-profile=long`` searches on; campaigns/soak.py
does the same with longer runs.
"""

from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from support.disk import Disk, Operation, operations


class Draw:
    """Choices that hypothesis makes, and makes smaller."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def one_of(self, values: Sequence[Any]) -> Any:
        return self._draw(st.sampled_from(values))

    def integer(self, least: int, most: int) -> int:
        return self._draw(st.integers(least, most))


@st.composite
def arguments(draw: st.DrawFn, operation: Operation) -> dict[str, Any]:
    return operation.draw(Draw(draw))


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk()

    @initialize(how=arguments(Disk.begin.operation))
    def begin(self, how: dict[str, Any]) -> None:
        self.disk.begin(**how)

    @invariant()
    def memory_is_bounded(self) -> None:
        self.disk.memory_is_bounded()

    def teardown(self) -> None:
        self.disk.end()


def _rule(name: str, operation: Operation) -> Any:
    def run(self: Machine, how: dict[str, Any]) -> None:
        getattr(self.disk, name)(**how)

    run.__name__ = name
    made = rule(how=arguments(operation))(run)
    return precondition(lambda self: operation.when(self.disk))(made)


for _name, _operation in operations().items():
    setattr(Machine, _name, _rule(_name, _operation))

TestDisk = Machine.TestCase
TestDisk.settings = settings(max_examples=3 * settings.default.max_examples, stateful_step_count=25)
