"""The run folder: names, locks, whole writes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from burnish.core.errors import ConfigError, Interrupted, LockedError, StorageError
from burnish.core.runs import RunFolder, append_json, check_name, cut, read_json, read_jsonl, write_atomic, write_json
from burnish.core.seeds import derive
from burnish.core.stop import Stop


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a\0b", "con", "CON", "x" * 300, "", ".hidden", "a/b", "é", "lpt1.txt", "a..b", "a."])
def test_odd_names_are_refused_with_a_slug_that_is_accepted(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_name(name)
    slug = caught.value.remedy.split("'")[1]  # type: ignore[union-attr]
    assert check_name(slug) == slug


def test_a_second_process_is_refused_and_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from burnish.core.runs import RunFolder
with RunFolder(Path({str(tmp_path / "r")!r})):
    print("held", flush=True); time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline().strip() == "held"
    with pytest.raises(LockedError, match=f"process {holder.pid}") as caught, RunFolder(tmp_path / "r"):
        pass
    assert caught.value.exit_code == 8
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunFolder(tmp_path / "r") as folder:
        assert folder.root.is_dir()


def test_a_run_folder_may_not_be_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "r").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="symbolic link"), RunFolder(tmp_path / "r"):
        pass


def test_writes_are_whole_or_absent(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    with pytest.raises(StorageError, match="cannot write"):
        write_atomic(tmp_path / "nowhere" / "a.json", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_torn_last_line_is_left_out_and_cut_forgets(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    append_json(path, {"step": 1})
    size = path.stat().st_size
    append_json(path, {"step": 2})
    with open(path, "ab") as out:
        out.write(b'{"step": 3')
    assert [r["step"] for r in read_jsonl(path)] == [1, 2]
    cut(path, size)
    assert [r["step"] for r in read_jsonl(path)] == [1]


def test_derived_seeds_are_pure_and_distinct() -> None:
    assert derive(0, "sampler") == derive(0, "sampler")
    seeds = {derive(s, n) for s in range(20) for n in ("a", "b", 1, "1")}
    assert len(seeds) == 80 and all(0 <= s < 2**63 for s in seeds)


def test_the_first_signal_sets_a_flag_and_the_second_acts() -> None:
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop.requested
        with pytest.raises(Interrupted) as caught:
            stop.check()
        assert caught.value.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
