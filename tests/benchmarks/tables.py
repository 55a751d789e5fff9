"""What benchmarks print: a table for people, and last one line of JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with a column for each name in the rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*names, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(shown(row.get(name, "")) for name in names))
    Console(width=160, markup=False).print(table)


def shown(value: Any) -> str:
    """Three digits that count."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def last(results: Mapping[str, Any]) -> None:
    """All of it as JSON."""
    print(json.dumps(results), flush=True)
