"""Run a program that is sent SIGTERM when its supervisor is gone, however it went.

    python -I -S launch.py SUPERVISOR_PID PROGRAM [ARGUMENT…]

The kernel keeps the setting over exec. It is tied to the supervisor's thread that
started us, which must be its main one. A file of its own that imports next to
nothing: code between fork and exec would not be safe in a process with threads,
and every process of the mesh starts through this.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Become the program."""
    supervisor, program, *arguments = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0):
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != int(supervisor):
        # It died before the setting took hold.
        sys.exit(0)
    try:
        os.execv(program, [program, *arguments])
    except OSError as error:
        sys.exit(f"can't run {program}: {error.strerror}")


if __name__ == "__main__":
    main()
