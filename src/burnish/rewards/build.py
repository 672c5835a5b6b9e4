"""A `rewards` block to something that scores. Torch-free; the user's files are executed in children only."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish.config.rewards import read_block
from burnish.config.schema import Choice, Reward
from burnish.config.schema import Rewards as Block
from burnish.core.errors import MachineError
from burnish.core.table import USER_ROW, RowDescription, bind, describe_row, load_row
from burnish.data.tasks.base import Task
from burnish.rewards import isolated
from burnish.rewards.scoring import Component, Rewards
from burnish.rewards.segments import START_S, Segmenter
from burnish.sandbox.pool import Pool


def build(block: Block | Mapping[str, Any] | Sequence[Any] | str, task: Task | str | None = None) -> Rewards:
    """Rewards that are ready to score; workers start at the first call. `task` is the `task` column of data without one.

    Raises ConfigError for a block that cannot be meant, MachineError where a reward needs a package that is missing.
    """
    block = read_block(block)
    components: list[Component] = []
    for reward in block.use:
        row = describe_row("reward", reward.name)
        about = row.about
        if about.package and importlib.util.find_spec(about.package) is None:
            message = f"needs the package {about.package}, which is not installed"
            raise MachineError(message, where=f"reward {reward.name}", remedy=f"pip install 'burnish[{about.extra}]'")
        settings = bind(row, reward.params, f"reward {reward.name}")
        components.append(Component(reward, row, settings, _pool(reward, row, block.workers)))
    cut = None
    if any(c.process for c in components):
        cut = Segmenter(block.steps or Choice(name="lines"), workers=block.workers, deadline_s=block.deadline_s)
    return Rewards(block, components, task.name if isinstance(task, Task) else task, cut)


def _pool(reward: Reward, row: RowDescription, workers: int) -> Pool | None:
    loaded: dict[str, str | None]
    if user := USER_ROW.fullmatch(reward.name):
        loaded = {"file": str(row.path.resolve()), "function": user["function"]}
    elif row.path == Path(isolated.__file__):
        function = load_row("reward", reward.name).__name__
        loaded = {"module": isolated.__name__, "function": function, "package": row.about.package}
    else:
        return None
    return Pool("burnish.rewards.worker", loaded, workers=workers, start_s=START_S)
