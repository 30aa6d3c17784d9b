"""Why a model cannot be loaded from a name, which may be a folder here or a model of the hub."""

from __future__ import annotations

import os
import re

# what the libraries say if the hub has no model of a name, or cannot be asked
_NOT_FOUND = re.compile(
    r"not a local folder|not a valid model|couldn't connect|can't load|repository not found|offline", re.IGNORECASE
)


def load_failure(name: str, what: str, error: BaseException) -> str:
    """The end of an error line: a name that is no folder here is said first, since it is usually mistyped.

    `what` could not be loaded (a tokenizer, a config, the model); `error` is that of the library.
    """
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if os.path.isdir(os.path.expanduser(name)):
        return f"no {what} can be loaded from {name}: {reason}"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:  # never a name of the hub
        return f"there is no folder {name}"
    if not _NOT_FOUND.search(reason):
        return f"no {what} can be loaded from {name}: {reason}"
    return f"there is no folder {name!r} in {os.getcwd()}, and the hub gives no {what} of that name: {reason}"
