"""Every test runs offline on one thread: the models are tiny, and two worker processes share the two cores."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    import torch

    import tests.pretended  # noqa: F401  (before the first backward of the process, which may be a module's own check)

    torch.set_num_threads(1)
