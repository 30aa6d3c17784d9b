"""The first process of a sandbox: sets the limits, runs the program, and reports on a socket how it ended.

sandbox.py passes this text to `python -c`, since a training process has threads: it can run nothing between fork and
exec. Arguments: the socket's descriptor, the user to become (0: none), number:soft:hard of each limit, the command.
"""

import os
import resource
import signal
import sys
from contextlib import suppress


def main(channel: int, user: int, limits: list[str], command: list[str]) -> None:
    """Wait for the word on `channel`, run the command, and answer its wait status, or an error that ends in "!"."""
    os.closerange(3, channel)
    os.closerange(channel + 1, 1 << 20)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as stream:
        stream.write("1000")  # short of memory, the kernel kills this before the training process
    os.write(channel, b"ready")
    if not os.read(channel, 1):
        return  # the training process is gone

    program = os.fork()
    while program:
        pid, status = os.wait()  # orphans too: in its namespace this is process 1, whose end kills all others
        if pid == program:
            os.write(channel, b"%d" % status)
            return

    try:
        os.set_inheritable(channel, False)
        if user:  # not the first process: a change of user would clear the signal that its parent's death sends
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        for limit in limits:
            number, soft, hard = map(int, limit.split(":"))
            resource.setrlimit(number, (soft, hard))
        for ignored in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(ignored, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.execvp(command[0], command)
    except OSError as error:
        os.write(channel, f"{error.strerror}!".encode())
    finally:
        os._exit(127)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(), sys.argv[4:])
