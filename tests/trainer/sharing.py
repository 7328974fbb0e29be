"""Start the processes of one run as ``torchrun`` does, but in forks (``test_processes.py`` starts ``torchrun``)."""

from __future__ import annotations

from pathlib import Path

from torch.distributed import TCPStore

from ..forks.client import Forks

ROOT = Path(__file__).resolve().parents[2]
TRAINER = ("-m", "flash_diffusion.trainer")
DISTIL = (*TRAINER, "distill")


def run_shared(forks: Forks, processes: int, *command: str | Path) -> str:
    """Run ``python COMMAND`` in several processes that know of each other, and return what they print.

    They meet where a launcher tells them to: at a store in this process.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    common |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    started = [
        forks.start(command, ROOT, together=True, RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(processes)
    ]
    try:
        texts = [process.communicate(timeout=800)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * processes, "\n".join(texts)
    return "\n".join(texts)
