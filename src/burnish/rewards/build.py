"""A `rewards` block to something that scores. Torch-free; the user's files are executed in children only."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish.config.rewards import read_block
from burnish.config.schema import Reward
from burnish.config.schema import Rewards as Block
from burnish.core.errors import MachineError
from burnish.core.table import USER_ROW, RowDescription, bind, describe_row, load_row
from burnish.data.tasks.base import Task
from burnish.rewards import isolated
from burnish.rewards.scoring import Component, Rewards
from burnish.sandbox.pool import Pool

START_S = 60.0  # how long a file may take to load, its imports included



