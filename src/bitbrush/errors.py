"""What can go wrong, in families. Every error says what happened, where, why, and what to try.

The command line turns a family into an exit code; nothing else in the package exits or prints.
"""

from __future__ import annotations


class BitbrushError(Exception):
    """Base of all errors that bitbrush raises on purpose.

    Args:
        what: What happened, in one sentence.
        where: The file, layer, timestep, recipe key or unit concerned.
        why: The cause: expected against found.
        try_: One thing to do about it, a command where there is one.
    """

    exit_code = 70
    family = "internal error"

    def __init__(self, what: str, *, where: str | None = None, why: str | None = None, try_: str | None = None) -> None:
        self.what, self.where, self.why, self.try_ = what, where, why, try_
        super().__init__(self._text())

    def _text(self) -> str:
        parts = (("what", self.what), ("where", self.where), ("why", self.why), ("try", self.try_))
        return "\n".join(f"{label + ':':<7}{text}" for label, text in parts if text)

    def to_dict(self) -> dict[str, str | int | None]:
        """The error as data, for ``--json``."""
        return {
            "error": self.family,
            "what": self.what,
            "where": self.where,
            "why": self.why,
            "try": self.try_,
            "exit_code": self.exit_code,
        }


class InputError(BitbrushError):
    """A recipe, prompt file, model, plan or option that cannot be used as given."""

    exit_code = 3
    family = "input error"


class ArtifactError(BitbrushError):
    """A saved result that is truncated, changed, foreign or of another format version."""

    exit_code = 4
    family = "artifact error"


class ResourceError(BitbrushError):
    """Memory, disk or a lock is missing. The run can be resumed."""

    exit_code = 5
    family = "resource error"


class NumericsError(BitbrushError):
    """NaN or Inf, or packed execution that disagrees with the simulation. The run can be resumed."""

    exit_code = 6
    family = "numerics error"


class InterruptedRun(BitbrushError):
    """Ctrl-C or SIGTERM; saved at the last unit. The run can be resumed."""

    exit_code = 130
    family = "interrupted"


class InternalError(BitbrushError):
    """A state that cannot happen: our bug."""


class Notice(UserWarning):
    """What a loaded network says once, through Python's warnings: it does something other than one might think."""
