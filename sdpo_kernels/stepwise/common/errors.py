"""The driver's two exceptions that are meant for a person; `sdpo` shows them as one line, without a traceback."""


class UserError(Exception):
    """A wrong input or setting; the message says what it was and what it should be."""


class Interrupted(Exception):
    """The run was stopped by a signal and has saved; the message says how to go on."""
