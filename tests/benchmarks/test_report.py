"""RESULTS.md from stored results, and a suite that goes on after an id that failed."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.__main__ import MODEL, command, run, shapes, summary
from benchmarks.harness import Case, Session, agree
from benchmarks.machine import ROOT, Calibration
from benchmarks.sft import BEST, DEFAULTS
from benchmarks.suite import BENCHES

from benchmarks import report


def sft_case(peer: str, ratio: float, small: bool = False, off: float = 0.0) -> Case:
    pair = {"ours": 122.6, "theirs": 15.0}
    return {
        "case": f"full, {peer}", "name": "full", "peer": peer, "small_vocabulary": small, "ratio": ratio, "worst_ratio": ratio - 0.5,
        "rate": pair, "best_rate": pair, "seconds": {"ours": [7.0], "theirs": [60.0]}, "blocks": 3, "discarded": 2, "achieved_gflops": 278.1,
        "of_limit": 0.51, "work_eff": 0.996, "checks": [agree("first loss", 14.0 + off, 14.0, 0.02)], "warmup_s": {"ours": 1.0, "theirs": 9.0},
        "peak_bytes": {"ours": 8.7e9, "theirs": 10.5e9}, "peak_ratio": 0.83,
    }  # fmt: skip


def result(date: str, cases: list[Case], error: str | None = None) -> dict[str, Any]:
    return {
        "schema": 1, "id": "B1", "title": "", "date": date, "command": "python -m benchmarks B1", "model": "gemma-270m", "quick": False,
        "environment": {"cpu": "A CPU", "flags": ["avx2"], "cores": 2, "threads": 2, "memory_gb": 24.0, "platform": "", "python": "", "commit": "abc"},
        "calibration": {"peak_gflops": {"float32": 217.0, "bfloat16": 424.0}, "read_gb_per_s": 32.0}, "best_gflops": 200.0, "seconds": 600.0,
        "versions": {"trl": {"trl": "1.16.0"}, "burnish": {"torch": "2.13.0"}}, "error": error, "cases": cases,
    }  # fmt: skip


def test_the_page_is_made_of_the_newest_results_alone(tmp_path: Path) -> None:
    report.store(result("2026-11-24", [sft_case(DEFAULTS, 9.99)]), tmp_path)
    gap = {"case": "full, 32k", "peer": DEFAULTS, "small_vocabulary": True, "not_measured": "no steady block: all 6 were discarded\nmore"}
    path = report.store(result("2026-11-25", [sft_case(DEFAULTS, 7.0), sft_case(BEST, 2.5), gap]), tmp_path)
    assert path.name == "2026-11-25-B1.json" and json.loads(path.read_text())["cases"][0]["ratio"] == 7.0
    (tmp_path / "2026-11-26-old.json").write_text("{}")  # of another kind
    text = report.write(tmp_path, tmp_path / "RESULTS.md").read_text()
    assert "9.99" not in text and "**7.00** (6.50)" in text and "15.0 / 122.6" in text
    assert "`python -m benchmarks B1`, 2026-11-25" in text and "6 blocks kept, 4 discarded (a product 15% off)" in text and "`results/2026-11-25-B1.json`" in text
    assert "A CPU" in text and "217 / 424" in text and "torch 2.13.0, trl 1.16.0" in text
    assert "| target, full, defaults | >= 5 | 7.00 (worst block 6.50) | met |" in text
    assert "| floor, full, best | >= 3 | 2.50 (worst block 2.00) | **MISSED** |" in text
    assert "| stretch, full, defaults | >= 8 | 7.00 (worst block 6.50) | **MISSED** |" in text
    assert "not measured: no steady block: all 6 were discarded |" in text
    assert "Criteria of what is stored: 1 met, 2 missed, 2 not measured." in text
    for name in BENCHES:
        assert f"## {name}. " in text
    assert text.count("unmeasured: run `benchmarks/gpu.sh`") == 5


def test_results_that_differ_meet_nothing(tmp_path: Path) -> None:
    found = result("2026-11-25", [sft_case(DEFAULTS, 7.0, off=1.0)], error="ChildError: it | ended\ntraceback")
    report.store(found, tmp_path)
    text = report.page(report.newest(tmp_path))
    assert "**DIFFERS:** first loss 7.1e-02" in text and "**Stopped early:** ChildError: it / ended" in text
    assert not any(c.met for c in report.criteria(found))


def test_an_empty_store_says_what_to_run(tmp_path: Path) -> None:
    text = report.page(report.newest(tmp_path))
    assert all(f"Not measured yet: `python -m benchmarks {name}`." in text for name in BENCHES) and "MISSED" not in text


def test_the_committed_page_is_what_the_stored_results_make() -> None:
    assert report.PAGE.read_text(encoding="utf-8") == report.page(report.newest())


def test_the_command_is_one_that_can_be_typed_again() -> None:
    asked = argparse.Namespace(ids=["B1", "B9"], threads=os.cpu_count(), quick=True, smoke=False)
    assert command(asked, MODEL) == "python -m benchmarks B1 B9 --quick"
    asked = argparse.Namespace(ids=[], threads=64_000, quick=False, smoke=False)
    assert command(asked, ROOT / "models/other") == "python -m benchmarks --model models/other --threads 64000"
    assert command(asked, Path("/somewhere/else")).startswith("python -m benchmarks --model else ")


def test_an_id_that_fails_keeps_what_it_measured(tmp_path: Path) -> None:
    def broken(session: Session) -> Iterator[Case]:
        yield sft_case(DEFAULTS, 7.0)
        raise RuntimeError("the machine caught fire")

    said: list[str] = []
    session = Session(tmp_path, tmp_path, Calibration({"float32": 1.0}, 1.0), lambda: 1.0, say=said.append)
    found = run(replace(BENCHES["B1"], run=broken), session, {"date": "2026-11-25"})
    assert found["error"] == "RuntimeError: the machine caught fire" and len(found["cases"]) == 1
    assert any("7.00x (worst block 6.50x), peak memory 0.83 of the peer's, 2 blocks discarded" in line for line in said)
    assert "DIFFERS in first loss" in summary(sft_case(DEFAULTS, 7.0, off=1.0)) and summary({"case": "c"}) == "c: not measured"
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "vocab_size": 1000}')
    assert shapes(tmp_path) == [(64, 256), (256, 64), (64, 1000)]
