"""The bundled tasks by name."""

from __future__ import annotations

from burnish.core.table import About, Table
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
    about={
        "sums": About(taxonomy=("B6",)),
        "route": About(taxonomy=("B6",)),
        "sorting": About(taxonomy=("B6",)),
        "letters": About(taxonomy=("B6",)),
    },
)
