"""The one exception the driver raises for mistakes that a person can mend."""


class UserError(Exception):
    """A wrong input or setting; its message is one clear line, shown without a traceback by `sdpo`."""
