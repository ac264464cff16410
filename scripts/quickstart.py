#!/usr/bin/env python3
"""Print the README's quick start: the first Python block under the heading of that name."""

import re
import sys
from pathlib import Path

readme = Path(__file__).resolve().parent.parent / "README.md"
found = re.search(
    r"^#+ *quick start\b.*?^```python\n(.*?)^```$",
    readme.read_text(encoding="utf-8"),
    re.DOTALL | re.IGNORECASE | re.MULTILINE,
)
if not found:
    sys.exit(f"{readme} has no Python block under a heading 'Quick start'")
print(found[1], end="")
