"""A process that has imported everything and run nothing: it forks a fresh burnish for every request.

One JSON line in: {"argv": [...], "cwd": "..."}; one out: {"pid": n}; when that child ends: {"ended": n, "code": c}.
Forking saves the seconds of import; no tensor operation has run in the parent, so the child starts from a clean slate.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    import burnish.pipeline  # noqa: F401  (torch, transformers, everything)
    from burnish.cli import main as burnish_main

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.chdir(order["cwd"])
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.argv = ["burnish", *order["argv"]]
            code = 1
            try:
                burnish_main()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
