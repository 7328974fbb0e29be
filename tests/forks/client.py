"""Python processes that need not import anything: forks of one process that has imported it all (``server.py``).

What a process changes ends with it. On Windows, which has no forks, :meth:`Forks.start` starts an ordinary process.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

SERVER = Path(__file__).resolve().parent / "server.py"


class Forked:
    """A process, with the methods of ``subprocess.Popen`` that tests use; ``output`` and ``errors`` are files."""

    output: Path
    errors: Path

    def __init__(self, forks: Forks, pid: int) -> None:
        self.forks, self.pid = forks, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code (minus the signal if one killed it), or None while it runs."""
        while self.returncode is None and self.forks.hear(0.0):
            pass
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code once it has ended."""
        end = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            if not self.forks.hear(None if end is None else max(end - time.monotonic(), 0.0)):
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end, and return what it printed: output and errors."""
        self.wait(timeout)
        return self.output.read_text(), "" if self.errors == self.output else self.errors.read_text()

    def send_signal(self, number: int) -> None:
        """Send it a signal unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it unless it has ended."""
        self.send_signal(signal.SIGKILL)


class Forks:
    """A process that has imported what others need, and forks for each of them.

    The process starts with the first of them. It has one thread, since a fork takes along no other thread.

    Args:
        prepare: a script that imports, and its arguments.
        environment: the environment of all processes.
    """

    def __init__(self, prepare: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        self.command = [sys.executable, SERVER, *prepare]
        self.environment = {**environment, "OMP_NUM_THREADS": "1"}
        self.server: subprocess.Popen[bytes] | None = None

    def start(
        self, command: Sequence[str | Path], folder: Path, *, together: bool = False, **environment: str
    ) -> Forked | subprocess.Popen[str]:
        """Start ``python COMMAND``.

        Args:
            command: a script, or ``-m`` and a module, and arguments.
            folder: the working directory.
            together: print errors into the output.
            environment: what differs from the environment of all.
        """
        words = [str(word) for word in command]
        if not hasattr(os, "fork"):
            errors = subprocess.STDOUT if together else subprocess.PIPE
            pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
            return subprocess.Popen([sys.executable, *words], cwd=folder, env=self.environment | environment, **pipes)
        if self.server is None:
            self._start_server()
        files = Path(tempfile.mkdtemp(dir=self.scratch.name))
        output = files / "output"
        errors = output if together else files / "errors"
        output.touch()
        errors.touch()
        request = {"command": words, "folder": str(folder), "environment": environment}
        request |= {"output": str(output), "errors": str(errors)}
        self.started = None
        try:
            self.server.stdin.write(json.dumps(request).encode() + b"\n")
            while self.started is None:
                self.hear(None)
        except BaseException:  # a time limit, Ctrl-C, or the server has ended: nobody knows of the process
            self.stop(at_once=True)
            raise
        self.started.output, self.started.errors = output, errors
        return self.started

    def hear(self, seconds: float | None) -> bool:
        """Wait for news of the server and take them in; return False if there is none in so many seconds."""
        if not select.select([self.server.stdout], [], [], seconds)[0]:
            return False
        news = os.read(self.server.stdout.fileno(), 2**16)
        if not news:
            raise EOFError("The process that forks has ended; its errors are above.")
        *lines, self.rest = (self.rest + news).split(b"\n")
        for line in lines:
            pid, *code = map(int, line.split())
            if code:
                self.running.pop(pid).returncode = code[0]
            else:
                self.started = self.running[pid] = Forked(self, pid)
        return True

    def stop(self, *, at_once: bool = False) -> None:
        """End the server, and the processes that still run; with ``at_once`` do not wait until it has imported."""
        if self.server:
            server, self.server = self.server, None
            if at_once or self.running:
                with suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)
            server.communicate()  # closes its input, with which it ends
            self.scratch.cleanup()

    def _start_server(self) -> None:
        self.scratch = tempfile.TemporaryDirectory()
        self.running: dict[int, Forked] = {}
        self.started: Forked | None = None
        self.rest = b""
        # A group of its own, to be killed together; unbuffered, for `select`.
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0, "start_new_session": True}
        self.server = subprocess.Popen(self.command, env=self.environment, **pipes)
