"""Block sizes and launch options of the fused kernels, chosen so that none of them spills.

`python -m kdav_fast.kernels.aot` compiles every line; no line was timed yet. Keys: target architecture, kernel
(the class kernel's tile of R is loaded for "dense" posteriors and built for "ids"), dtype of the similarity
products. Ampere holds operands in registers and takes smaller tiles; Blackwell's sums are in tensor memory.
"""

from typing import NamedTuple

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Tile(NamedTuple):
    """Sizes of a program's blocks; a size of 0 is not one of that kernel's."""

    rows: int
    items: int
    depth: int
    classes: int = 0
    width: int = 0
    num_warps: int = 8
    num_stages: int = 2

    def constants(self) -> dict[str, int]:
        """The kernel's block constants by name."""
        sizes = {
            "BLOCK_B": self.rows,
            "BLOCK_L": self.items,
            "BLOCK_D": self.depth,
            "BLOCK_K": self.classes,
            "BLOCK_W": self.width,
        }
        return {name: size for name, size in sizes.items() if size}

    def options(self) -> dict[str, int]:
        """Launch options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


TILES: dict[str, dict[str, dict[torch.dtype, Tile]]] = {
    "sm_80": {
        "membership": dict.fromkeys((BF16, FP16), Tile(64, 128, 32, num_stages=3)) | {FP32: Tile(64, 32, 32)},
        "dense": dict.fromkeys((BF16, FP16), Tile(64, 32, 32, 256)) | {FP32: Tile(64, 32, 32, 128)},
        "ids": dict.fromkeys((BF16, FP16), Tile(64, 32, 32, 256)) | {FP32: Tile(64, 32, 32, 128)},
        "gradient": dict.fromkeys((BF16, FP16), Tile(64, 32, 32, 32, 256))
        | {FP32: Tile(64, 32, 16, 16, 128)},
    },
    "sm_90": {
        "membership": dict.fromkeys((BF16, FP16), Tile(64, 128, 64, num_stages=3))
        | {FP32: Tile(64, 64, 32, num_warps=4)},
        "dense": dict.fromkeys((BF16, FP16), Tile(64, 64, 64, 512)) | {FP32: Tile(64, 32, 32, 128)},
        "ids": dict.fromkeys((BF16, FP16), Tile(64, 32, 64, 512)) | {FP32: Tile(64, 16, 32, 128)},
        "gradient": {
            BF16: Tile(64, 32, 64, 64, 512),
            FP16: Tile(64, 32, 64, 32, 256),  # TF32 class products beside 512 columns spill
            FP32: Tile(64, 16, 32, 32, 128),
        },
    },
    "sm_100": {
        "membership": dict.fromkeys((BF16, FP16), Tile(64, 128, 64, num_stages=3))
        | {FP32: Tile(64, 64, 32, num_warps=4)},
        "dense": dict.fromkeys((BF16, FP16), Tile(64, 64, 64, 256)) | {FP32: Tile(64, 32, 32, 128)},
        "ids": dict.fromkeys((BF16, FP16), Tile(64, 32, 64, 512)) | {FP32: Tile(64, 16, 32, 128)},
        "gradient": dict.fromkeys((BF16, FP16), Tile(64, 32, 64, 64, 512))
        | {FP32: Tile(64, 32, 32, 32, 128)},
    },
}


def architecture(device: torch.device) -> str:
    """The table's key for a device: the newest target that is not newer; sm_90 for the interpreter."""
    if device.type != "cuda":
        return "sm_90"
    major, _ = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(
            f"impl 'triton' was given a device of compute capability {major}.x; it needs 8.0 or newer: "
            "use impl='chunked'"
        )
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100")
