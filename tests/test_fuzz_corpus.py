"""The images that the fuzzer once found are used again, in a plain build and in bounded memory."""

from pathlib import Path

import pytest
from campaigns.fuzz import store
from campaigns.fuzz.replay import replay

pytestmark = pytest.mark.not_for_qemu("damaged images")


def test_the_corpus_leads_to_nothing_any_more(tmp_path: Path) -> None:
    images = store.corpus()
    assert len(images) > 50
    assert replay(tmp_path, images) == (len(images), [])


def test_a_hang_is_told_with_the_image_under_way(tmp_path: Path) -> None:
    images = dict(list(store.corpus().items())[:2])
    used, wrong = replay(tmp_path, images, hang=0)
    assert used == 2
    assert [what.split(": ")[:2] for what in wrong] == [
        [name, "said nothing for 0 s"] for name in images
    ]


def test_a_death_is_told_and_the_rest_is_used_nevertheless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = dict(list(store.corpus().items())[:3])
    victim = list(images)[1]
    # A folder is no image, and nobody expects one.
    (tmp_path / victim).mkdir()
    monkeypatch.setattr(Path, "write_bytes", _but_not_over_folders)
    used, wrong = replay(tmp_path, images)
    assert used == 3
    assert len(wrong) == 1
    assert wrong[0].startswith(f"{victim}: died with 1: ")


_write_bytes = Path.write_bytes


def _but_not_over_folders(path: Path, data: bytes) -> int:
    return len(data) if path.is_dir() else _write_bytes(path, data)
