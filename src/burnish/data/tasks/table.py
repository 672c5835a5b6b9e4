"""The bundled tasks by name."""

from __future__ import annotations

from burnish.core.table import Table
from burnish.data.tasks.letters import LETTERS
from burnish.data.tasks.route import ROUTE
from burnish.data.tasks.sorting import SORTING
from burnish.data.tasks.sums import SUMS

TASKS = Table(
    "task",
    {
        "sums": SUMS,
        "route": ROUTE,
        "sorting": SORTING,
        "letters": LETTERS,
    },
    also={"addition": "sums", "arithmetic": "sums", "path": "route", "maze": "route", "sort": "sorting"},
)
