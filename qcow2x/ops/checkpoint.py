"""A checkpoint of several images: the same bitmap in each, begun at the same instant, or in none.

While writers of all images wait, each image gets a bitmap under a passing name, which says what it
is part of; then each is given its real name. The first new name is the moment at which the
checkpoint exists. A passing bitmap is an ordinary one to every writer, QEMU included, and tracked
as such. So what a crash left half done can be settled at any later time, whatever was written
since: with the images at hand, the bitmaps either all get their name or all go
(:func:`settle_checkpoints`). No image names another, and nothing is opened that was not given.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from qcow2x import bitmap as _bitmap

if TYPE_CHECKING:
    from qcow2x.image import Image

__all__ = ["checkpoint", "settle_checkpoints"]

_PREFIX = ".qcow2x-checkpoint:"


class _Passing(NamedTuple):
    """What a passing name says."""

    id: str
    #: Images that the checkpoint is of.
    images: int
    name: str

    def __str__(self) -> str:
        return f"{_PREFIX}{self.id}:{self.images}:{self.name}"


def _parse(name: str) -> _Passing | None:
    if not name.startswith(_PREFIX):
        return None
    ident, _, rest = name[len(_PREFIX) :].partition(":")
    images, _, final = rest.partition(":")
    if not ident or not images.isdecimal() or not final:
        return None
    return _Passing(ident, int(images), final)


def checkpoint(
    images: Iterable[Image | str | os.PathLike[str]], name: str, *, granularity: int = 65536
) -> None:
    """Adds an enabled bitmap ``name`` to each of ``images`` at the same instant: writers of all of
    them wait meanwhile, and all that was written before is durable. Durable at return.

    An image is open with mode ``"r+"``, or a path, which is opened without its backing file. After
    a crash in between, :func:`settle_checkpoints` with the same images makes it all or nothing; it
    is also done at the start here.

    If an image refuses, none keeps the bitmap. Raises what ``image.bitmaps.add`` raises, ValueError
    for no images or the same one twice.
    """
    with _alone(images) as held:
        _settle(held)
        for image in held:
            if name in image.bitmaps:
                raise ValueError(f"{image.name}: there is a bitmap named {name!r} already")
        passing = str(_Passing(uuid.uuid4().hex, len(held), name))
        try:
            for image in held:
                _bitmap.add(image, passing, granularity, True)
        except BaseException:
            # What cannot be taken back now is so when it is settled.
            for image in held:
                if passing in image.bitmaps:
                    _bitmap.remove(image, passing)
            raise
        for image in held:
            _bitmap.rename(image, passing, name)


def settle_checkpoints(
    images: Iterable[Image | str | os.PathLike[str]],
) -> dict[str, bool]:
    """Ends checkpoints that a crash left half done in ``images``, which must be all images they are
    of. Returns, by name, whether each came about (True) or was taken back; empty if there was
    nothing to do. Raises ValueError if images are missing, and then changes nothing."""
    with _alone(images) as held:
        return _settle(held)


def _settle(images: list[Image]) -> dict[str, bool]:
    begun: dict[_Passing, list[Image]] = {}
    for image in images:
        for bitmap in image.bitmaps:
            passing = _parse(bitmap)
            if passing is not None:
                begun.setdefault(passing, []).append(image)
    for passing in begun:
        if passing.images > len(images):
            raise ValueError(
                f"checkpoint {passing.name!r} is of {passing.images} images, {len(images)} given; "
                "give all of them"
            )
    settled: dict[str, bool] = {}
    for passing, waiting in begun.items():
        named = [image for image in images if passing.name in image.bitmaps]
        # Names are given only when every image has its bitmap, so one that has neither means that
        # the crash came before.
        came_about = bool(named) and len(named) + len(waiting) >= passing.images
        came_about = came_about and not any(image in named for image in waiting)
        for image in waiting:
            if came_about:
                _bitmap.rename(image, str(passing), passing.name)
            else:
                _bitmap.remove(image, str(passing))
        settled[passing.name] = came_about or settled.get(passing.name, False)
    return settled


@contextmanager
def _alone(images: Iterable[Image | str | os.PathLike[str]]) -> Iterator[list[Image]]:
    """The images, open, each to ourselves, no write under way in any, and what was written durable."""
    from qcow2x.image import Image
    from qcow2x.image import open as open_image

    with ExitStack() as stack:
        held = []
        for given in images:
            if isinstance(given, Image):
                held.append(given)
            else:
                # Bitmaps need none of what lies below.
                opened = open_image(given, "r+", backing=False)
                held.append(stack.enter_context(opened))
        if not held or len({id(image) for image in held}) != len(held):
            raise ValueError("a checkpoint is of one or more images, each given once")
        for image in held:
            if not image.writable:
                raise PermissionError(f"{image.name}: is open read-only")
        # In one order for everybody, so that two checkpoints do not wait for each other.
        for image in sorted(held, key=id):
            stack.enter_context(image._exclusive)
            stack.enter_context(_bitmap.frozen(image))
        for image in held:
            image.flush()
            _bitmap.store(image)
        yield held
