"""Pages that a command writes stand in the navigation from the moment that they are there.

docs/coverage.md: python -m mlxshim.coverage; docs/performance.md: python -m benchmarks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

GENERATED = {"coverage.md", "performance.md"}


def on_config(config: Any) -> Any:
    config.nav = _there(config.nav, Path(config.docs_dir))
    return config


def _there(nav: list[Any], docs: Path) -> list[Any]:
    kept = []
    for entry in nav:
        title, target = next(iter(entry.items()))
        if isinstance(target, list):
            kept.append({title: _there(target, docs)})
        elif target not in GENERATED or (docs / target).exists():
            kept.append(entry)
    return kept
