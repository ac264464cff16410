"""The README's feature matrix: every row has a test, and every link leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
LINK = re.compile(r"\[[^\]]+\]\(([^)#]+)(#[^)]*)?\)")


def matrix() -> list[list[str]]:
    _, _, rest = README.partition("| element of the specification |")
    rows = []
    for line in rest.splitlines()[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_matrix_is_there() -> None:
    assert len(matrix()) > 20


@pytest.mark.parametrize("row", matrix(), ids=lambda row: row[0][:40])
def test_a_row_names_its_tests(row: list[str]) -> None:
    element, read, write, tests = row
    assert element
    assert {read, write} <= {"yes", "-"}
    files = [path for path, _ in LINK.findall(tests)]
    assert files
    for path in files:
        assert "def test_" in (ROOT / path).read_text() or "TestCase" in (ROOT / path).read_text()


@pytest.mark.parametrize(
    "path", sorted({path for path, _ in LINK.findall(README) if "://" not in path})
)
def test_a_link_leads_somewhere(path: str) -> None:
    assert (ROOT / path).exists()
