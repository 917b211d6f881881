"""The errors that a user can cause: what is wrong, what was found, what to do; one exit code each."""

from __future__ import annotations


class LayerboostError(Exception):
    """A failure with a message for the user. Exit code 1."""

    exit_code = 1

    def __init__(self, wrong: str, *, found: str = "", do: str = "") -> None:
        self.wrong, self.found, self.do = wrong, found, do
        lines = [wrong]
        if found:
            lines.append(f"found: {found}")
        if do:
            lines.append(f"do: {do}")
        super().__init__("\n".join(lines))


class ConfigError(LayerboostError):
    """A command, recipe, plan, model or data set that cannot be used as given. Exit code 2."""

    exit_code = 2


class InfeasibleBudget(LayerboostError):
    """No plan meets the budget; the message names the nearest plan. Exit code 3."""

    exit_code = 3


class GateMissed(LayerboostError):
    """The boosted model lost more quality than the recipe's gate allows. Exit code 4."""

    exit_code = 4


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message (two if it ends with a colon), or the error's type."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first
