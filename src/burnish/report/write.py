"""report.html and report.json of a run folder, written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from burnish.core.runs import RunFolder, write_atomic, write_json
from burnish.report.collect import collect
from burnish.report.html import render


def write_report(run_folder: str | Path) -> dict[str, Any]:
    """Collect, render, write both files, and return what report.json holds. Raises ConfigError, StorageError."""
    report = collect(run_folder)
    folder = RunFolder(Path(run_folder))
    page = render(report)
    write_json(folder.report_json, report)
    write_atomic(folder.report_html, page)
    return report
