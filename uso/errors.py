"""What can go wrong, as one tree. Every message is for a person: field, value, limit, remedy.

USOError
├── InputError (also a ValueError)   the request is wrong; `.field` says where
│   └── ImageError                   a picture is wrong
├── CheckpointError                  weights are missing, unknown or damaged
└── Cancelled                        somebody asked to stop
"""


class USOError(Exception):
    """Base of all errors this package raises on purpose."""


class InputError(USOError, ValueError):
    """Something in the request cannot be used; `field` is the request field to mark, if one is to blame."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class ImageError(InputError):
    """A picture cannot be opened or has a shape the model cannot use."""


class CheckpointError(USOError):
    """Weights that are missing, incomplete, unknown or not safe to load."""


class Cancelled(USOError):
    """The work was cancelled; not a fault."""
