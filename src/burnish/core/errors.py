"""One error tree. Every error says where, what was given, what was wanted, and what to type instead.

The class decides the exit code of the process (architecture 3.11): a message is for people, a code for scripts.
Each class also inherits the standard exception it specialises, so that library users catch what they expect.
"""

from __future__ import annotations


class BurnishError(Exception):
    """An error burnish understands. Anything else that reaches the command line is our bug (exit code 1).

    `where` is `file:line  key` or the noun at fault; `remedy` is what to type or change.
    """

    exit_code: int = 1

    def __init__(self, message: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.message, self.where, self.remedy = message, where, remedy
        super().__init__(self.render())

    def render(self) -> str:
        """`where  message` on one line, the remedy on the next."""
        head = f"{self.where}  {self.message}" if self.where else self.message
        return f"{head}\n  {self.remedy}" if self.remedy else head


class ConfigError(BurnishError, ValueError):
    """A recipe, an override or a command line that cannot be meant (2)."""

    exit_code = 2


class DataError(BurnishError, ValueError):
    """Rows that cannot be read, are malformed, or leave nothing to do (3)."""

    exit_code = 3


class MachineError(BurnishError, RuntimeError):
    """A missing dependency, device, dtype or amount of memory (4)."""

    exit_code = 4


class DivergedError(BurnishError, ArithmeticError):
    """Training left the finite numbers (5)."""

    exit_code = 5


class RewardError(BurnishError, RuntimeError):
    """A reward, verifier or judge failed more often than allowed (6)."""

    exit_code = 6


class StorageError(BurnishError, OSError):
    """A file that is missing, damaged, unsafe to read, or cannot be written (7)."""

    exit_code = 7

    def __str__(self) -> str:  # OSError would render its own arguments
        return self.render()


class LockedError(BurnishError, RuntimeError):
    """Another process is working in the same run folder (8)."""

    exit_code = 8


class CompleteError(BurnishError, RuntimeError):
    """There is nothing left to do (9)."""

    exit_code = 9


class Interrupted(BurnishError):
    """A signal asked us to stop; what was done is saved (130 SIGINT, 143 SIGTERM)."""

    def __init__(self, message: str, *, signal: int, where: str | None = None, remedy: str | None = None) -> None:
        self.signal = signal
        self.exit_code = 128 + signal
        super().__init__(message, where=where, remedy=remedy)
