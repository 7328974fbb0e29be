"""Forked processes are alone with what they change, and tell how they end as ordinary ones do."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .client import Forks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no forks")


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Forks of a process that has imported a module with a state."""
    folder = tmp_path_factory.mktemp("forks")
    (folder / "shared.py").write_text("import os\nvalues = []\nimported_by = os.getpid()\nprint('no answer')\n")
    (folder / "prepare.py").write_text("import shared\n")
    started = Forks([folder / "prepare.py"], {**os.environ, "OF_ALL": "1"})
    yield started
    started.stop()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


def test_a_process_has_imported_and_its_changes_end_with_it(forks: Forks, script: Path, tmp_path: Path) -> None:
    script.write_text(
        "import os, shared, sys\n"
        "print(shared.values, 'CHANGED' in os.environ, shared.imported_by, shared.imported_by != os.getpid())\n"
        "shared.values.append(1)\n"
        "os.environ['CHANGED'] = sys.path[0] = 'changed'\n"
        "os.chdir('/')\n"
    )
    first, second = (forks.start([script], tmp_path).communicate()[0] for _ in range(2))
    assert first == second == f"[] False {forks.server.pid} True\n"


def test_a_process_is_given_what_an_ordinary_one_is(forks: Forks, script: Path, tmp_path: Path) -> None:
    script.write_text(
        "import os, sys\n"
        "print(__name__, sys.argv[1:], os.environ['OF_ALL'], os.environ['OWN'], os.getcwd(), repr(sys.stdin.read()))\n"
        "sys.stderr.write('error')\n"
    )
    started = forks.start([script, "a b", 2], tmp_path, OWN="two words")
    expected = f"__main__ ['a b', '2'] 1 two words {tmp_path} ''\n"
    assert started.communicate() == (expected, "error")
    both = forks.start([script, "a b", 2], tmp_path, together=True, OWN="two words").communicate()
    assert "error" in both[0]
    assert both[1] == ""


def test_a_module_is_run_as_main(forks: Forks, tmp_path: Path) -> None:
    started = forks.start(["-m", "timeit", "-n", "1", "-r", "1", "print('run')"], tmp_path)
    assert started.communicate()[0].startswith("run\n1 loop")
    assert started.returncode == 0


@pytest.mark.parametrize(
    ("code", "ended", "words"),
    [
        ("raise KeyError('lost')", 1, "KeyError: 'lost'\n"),
        ("import sys\nsys.exit('in words')", 1, "in words\n"),
        ("import sys\nsys.exit(130)", 130, ""),
        ("import os\nos.kill(os.getpid(), 11)", -11, ""),
    ],
)
def test_a_failure_has_its_code_and_its_words(
    forks: Forks, script: Path, tmp_path: Path, code: str, ended: int, words: str
) -> None:
    script.write_text(code)
    started = forks.start([script], tmp_path)
    assert started.communicate()[1].endswith(words)
    assert started.poll() == started.wait() == ended


def test_two_processes_run_at_once_and_get_their_own_signals(forks: Forks, script: Path, tmp_path: Path) -> None:
    script.write_text("import signal\nprint('here', flush=True)\nsignal.pause()\n")
    one, other = (forks.start([script], tmp_path) for _ in range(2))
    for process in (one, other):
        while process.output.read_text() != "here\n":
            assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(0.0)
    one.send_signal(signal.SIGTERM)
    assert one.wait() == -signal.SIGTERM
    assert other.poll() is None
    other.kill()
    assert other.wait() == -signal.SIGKILL
    other.kill()  # of no one


def test_an_interrupted_test_ends_its_process(forks: Forks, script: Path, tmp_path: Path) -> None:
    """As ``run_inside`` does after a time limit or Ctrl-C."""
    script.write_text("import signal\nprint('here', flush=True)\nsignal.pause()\n")
    started = forks.start([script], tmp_path)

    def interrupt() -> None:
        while started.output.read_text() != "here\n":
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)  # a process in the background may ignore SIGINT

    def wait() -> None:
        threading.Thread(target=interrupt, daemon=True).start()
        started.wait()

    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        wait()
    signal.signal(signal.SIGUSR1, before)
    started.kill()
    assert started.wait() == -signal.SIGKILL


def test_the_end_of_the_session_ends_all_processes(script: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "prepare.py").touch()
    held = tmp_path / "held"
    held.touch()
    script.write_text(
        "import fcntl, signal, sys\n"
        "file = open(sys.argv[1])\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('here', flush=True)\n"
        "signal.pause()\n"
    )
    forks = Forks([tmp_path / "prepare.py"], os.environ)
    started = forks.start([script, held], tmp_path)
    while started.output.read_text() != "here\n":
        assert started.poll() is None
    forks.stop()
    with held.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits as long as the process lives


def test_an_import_that_fails_is_a_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prepare.py").write_text("import no_such_module")
    with pytest.raises((EOFError, BrokenPipeError)):
        Forks([tmp_path / "prepare.py"], os.environ).start(["script.py"], tmp_path)
    assert "No module named 'no_such_module'" in capfd.readouterr().err
