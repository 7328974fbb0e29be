"""Notice that another process of a run has ended, and stop with a sentence instead of waiting for it.

A process that waits for a message of a dead one waits for minutes, or forever. So each process writes a small file into
the run's folder every two seconds, and reads those of the others.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from ...files import remove_folder
from ...interrupts import Interrupted
from ..checkpoint import checkpoints

FOLDER = ".processes"
INTERVAL = 2.0  # seconds between two beats
SILENT = 30.0  # seconds without a beat after which a process on another machine counts as ended
GRACE = 5.0  # seconds in which this process may end by an error of its own, which says more


@dataclass
class Peer:
    """What is known of another process.

    Attributes:
        beat: the last number that it wrote.
        seen: when that number was new, on this process's own clock.
    """

    pid: int = 0
    host: str = ""
    beat: int = -1
    seen: float = 0.0
    error: str = ""


class Peers:
    """The other processes of a run, as their files tell.

    Args:
        folder: of the files, which all processes see.
        rank, ranks: this process, and how many there are.
    """

    def __init__(self, folder: Path, rank: int, ranks: int) -> None:
        self.folder, self.rank, self.ranks = folder, rank, ranks
        self.host = socket.gethostname()
        self._beat = 0
        self._peers = {other: Peer(seen=time.monotonic()) for other in range(ranks) if other != rank}

    def write(self, error: str = "") -> None:
        """Tell the others that this process lives, or of which error it ends."""
        self._beat += 1
        facts = {"pid": os.getpid(), "host": self.host, "beat": self._beat, "error": error}
        partial = self.folder / f".{self.rank}.partial"
        with suppress(OSError):  # a full disk is found by those who write what lasts
            partial.write_text(json.dumps(facts), encoding="utf-8")
            os.replace(partial, self._path(self.rank))

    def leave(self) -> None:
        """Tell the others that this process has done its work."""
        with suppress(OSError):
            self._path(self.rank).unlink(missing_ok=True)

    def gone(self) -> list[str]:
        """Return a sentence for each process that has ended before its work was done."""
        found = []
        for rank, peer in self._peers.items():
            if not self._read(rank, peer):
                continue
            name = f"process {rank} of {self.ranks} (pid {peer.pid} on {peer.host})"
            if peer.error:
                found.append(f"{name} has stopped: {peer.error}")
            elif peer.host == self.host and _lives(peer.pid):
                continue  # however long a library keeps it from writing
            elif peer.host == self.host:
                found.append(f"{name} has ended without a word; it was killed, perhaps because the memory was full")
            elif time.monotonic() - peer.seen > SILENT:
                found.append(f"{name} has given no sign of life for {SILENT:.0f} seconds")
        return found

    def _read(self, rank: int, peer: Peer) -> bool:
        """Update what is known of a process; return False where it has not begun or has done its work."""
        try:
            facts = json.loads(self._path(rank).read_text(encoding="utf-8"))
            if facts["beat"] != peer.beat:
                peer.seen = time.monotonic()
            peer.pid, peer.host, peer.beat, peer.error = (facts[name] for name in ("pid", "host", "beat", "error"))
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return True

    def _path(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"


def _lives(pid: int) -> bool:
    """Return whether a process of this machine is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def go_on(output: Path) -> str:
    """Return from where a run can go on."""
    found = checkpoints(output)
    return f"--resume goes on from {found[-1]}" if found else "there is no checkpoint yet"


@contextmanager
def watched(output: Path, accelerator: Accelerator) -> Iterator[Peers | None]:
    """Watch the other processes inside the ``with`` block; end this process with a sentence when one has ended.

    Yields:
        The other processes, None for a run of one process.
    """
    if accelerator.num_processes == 1 or os.name == "nt":  # Windows ends a process whose pid is asked for
        yield None
        return
    folder = output / FOLDER
    if accelerator.is_main_process:
        remove_folder(folder)
        folder.mkdir()
    accelerator.wait_for_everyone()
    peers = Peers(folder, accelerator.process_index, accelerator.num_processes)
    peers.write()
    accelerator.wait_for_everyone()
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(peers, output, done), daemon=True, name="peers")
    thread.start()
    try:
        yield peers
    except Interrupted:  # all processes stop together
        done.set()
        peers.leave()
        raise
    except BaseException as error:
        done.set()
        peers.write(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        raise
    else:
        done.set()
        peers.leave()
    finally:
        thread.join()


def _watch(peers: Peers, output: Path, done: threading.Event) -> None:
    """Beat and listen until ``done``; end the process when another one has ended."""
    while not done.wait(INTERVAL):
        peers.write()
        if not (gone := peers.gone()) or done.wait(GRACE):
            continue
        text = f"{'; '.join(gone)}. This process stops too, because it can't go on alone; {go_on(output)}"
        peers.write(text)
        # The main thread waits inside a library for a message that never comes: no exception reaches it.
        os.write(sys.stderr.fileno(), f"\nflash-diffusion: process {peers.rank}: {text}\n".encode())
        os._exit(1)
