"""Fork a process for each request, from one process that has imported what all of them need.

python server.py PREPARE [ARGUMENT...]

PREPARE is a script that imports. Then each line on the input is a JSON object with the arguments of :func:`run`. Lines
on the output tell the pid of a new process, and the pid and exit code of one that has ended (minus the signal if one
killed it). The server ends with its input.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
from pathlib import Path


def main() -> None:
    """Import once, then fork for each request."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what an import prints is no answer
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0])
    gc.freeze()  # the processes share these objects' memory, and collect their own faster

    def tell_ended(*_: object) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            os.write(answers, b"%d %d\n" % (pid, os.waitstatus_to_exitcode(status)))

    signal.signal(signal.SIGCHLD, tell_ended)
    for line in sys.stdin:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # its start is told before its end
        child = os.fork()
        if not child:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            return run(**json.loads(line))
        os.write(answers, b"%d\n" % child)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def run(command: list[str], folder: str, environment: dict[str, str], output: str, errors: str) -> None:
    """Run a script, or ``-m`` and a module, as ``python COMMAND`` would, but with the search path of PREPARE."""
    for number, path, mode in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_APPEND), (2, errors, os.O_APPEND)):
        os.dup2(os.open(path, mode | (os.O_WRONLY if number else 0)), number)
    os.chdir(folder)
    os.environ.update(environment)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a script's last line; Python's own end would first take all modules apart


if __name__ == "__main__":
    main()
