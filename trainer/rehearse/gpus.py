"""Graphics cards: memory, arithmetic and bandwidth, as their makers publish them."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError

TERA, GIGA, GIB = 1e12, 1e9, 2**30


@dataclass(frozen=True)
class Gpu:
    """One card.

    Attributes:
        name: in words.
        memory: GiB.
        bf16: TFLOP/s of dense matrix products in bfloat16 with float32 sums.
        fp32: TFLOP/s in float32, without TF32.
        bandwidth: GB/s of its memory.
        source: where the numbers are published.
    """

    name: str
    memory: float
    bf16: float
    fp32: float
    bandwidth: float
    source: str

    def flops(self, precision: str) -> float:
        """Return the peak FLOP/s at a recipe's precision: ``no`` or ``bf16``."""
        return (self.bf16 if precision == "bf16" else self.fp32) * TERA


AMPERE = "NVIDIA, Ampere GA102 whitepaper"
ADA = "NVIDIA, Ada whitepaper"
# Cards that the whitepapers leave out: float32 = 2 x cores x boost clock; bf16 with float32 sums is twice that, as of
# the cards that they list.
RATED = "NVIDIA, product page: cores x boost clock"
GPUS = {
    "3060": Gpu("GeForce RTX 3060", 12, 25.5, 12.7, 360, RATED),
    "3090": Gpu("GeForce RTX 3090", 24, 71.0, 35.6, 936, AMPERE),
    "4060": Gpu("GeForce RTX 4060", 8, 30.2, 15.1, 272, RATED),
    "4070": Gpu("GeForce RTX 4070", 12, 58.3, 29.1, 504, RATED),
    "4080": Gpu("GeForce RTX 4080", 16, 97.5, 48.7, 717, ADA),
    "4090": Gpu("GeForce RTX 4090", 24, 165.2, 82.6, 1008, ADA),
    "5090": Gpu("GeForce RTX 5090", 32, 209.5, 104.8, 1792, "NVIDIA, RTX Blackwell whitepaper"),
    "l4": Gpu("L4", 24, 121.0, 30.3, 300, "NVIDIA, L4 datasheet"),
    "l40s": Gpu("L40S", 48, 362.1, 91.6, 864, "NVIDIA, L40S datasheet"),
    "a100": Gpu("A100 SXM 80 GB", 80, 312.0, 19.5, 2039, "NVIDIA, A100 datasheet"),
    "h100": Gpu("H100 SXM", 80, 989.4, 66.9, 3350, "NVIDIA, H100 datasheet"),
    "h200": Gpu("H200", 141, 989.4, 66.9, 4800, "NVIDIA, H200 datasheet"),
}
DEFAULT_GPU = "4090"
# Assumptions, not measurements: the share of a card's peak that training reaches, the memory that the driver, the
# libraries' workspaces and fragmentation take, and the speed of copies to the card.
UTILISATION = 0.35
RESERVED = 1.0  # GiB
BUS = 12.0  # GB/s of copies from pinned memory: three quarters of PCIe 4.0 with 8 lanes, as cards of 8 GB have


def gpu_of(name: str) -> Gpu:
    """Return the card of that name; "RTX 4090" and "rtx4090" are the 4090.

    Raises:
        UserError: the table has no such card.
    """
    key = name.lower().replace(" ", "").removeprefix("geforce").removeprefix("nvidia").removeprefix("rtx")
    if key not in GPUS:
        raise UserError(f"--gpu: there is no card {name!r} in the table; expected one of {', '.join(GPUS)}")
    return GPUS[key]
