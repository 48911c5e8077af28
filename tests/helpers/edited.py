"""Files that were edited by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def edit_json(path: Path, target: Path | None = None, **fields: Any) -> None:
    """Replaces fields of a JSON file by `section__field=value`, and removes its hash, as one who edits it must."""
    content = json.loads(path.read_text())
    content.pop("uvit_hash", None)
    for name, value in fields.items():
        *sections, field = name.split("__")
        place = content
        for section in sections:
            place = place[section]
        assert field in place
        place[field] = value
    (target or path).write_text(json.dumps(content))
