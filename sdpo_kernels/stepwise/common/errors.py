"""The two exceptions that the driver raises for the user; `sdpo` prints them as one line, without a traceback."""


class UserError(Exception):
    """A wrong input or setting; the message says what it was and what it must be."""


class Interrupted(Exception):
    """A signal stopped the run after its state was saved; the message says how to resume."""
