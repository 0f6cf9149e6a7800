"""What decodes images: DALI, which is tried on one, and a GPU's JPEG engine."""

import importlib

from kdav_fast.doctor.probing import INSTALL, Answer, Off, capability, version_of
from kdav_fast.errors import one_line

# NVIDIA's nvJPEG documentation: A100 and A30, Hopper and data-centre Blackwell have the decoder.
WITH_JPEG_DECODER = {(8, 0), (9, 0), (10, 0), (10, 3)}
# As nvImageCodec's warning has it.
REGIONS_WITH_FANCY_UPSAMPLING = (13, 2)
# An 8 x 8 grey JPEG: small, and it takes the whole decoding path.
TINY_JPEG = bytes.fromhex(
    f"ffd8ffdb004300{'ff' * 64}ffc0000b080008000801011100ffc400140001{'00' * 16}"
    f"ffc400141001{'00' * 16}ffda0008010100003f003fffd9"
)


def dali(device: str, remedy: str) -> Answer:
    """Let DALI decode an image.

    Args:
        device: "cpu" or "mixed", which is the GPU.
        remedy: what to do until it works.
    """
    try:
        dali = importlib.import_module("nvidia.dali")
    except ImportError as error:
        raise Off(f"nvidia.dali cannot be imported: {error}", f"{INSTALL} on Linux; {remedy}") from None
    if device == "mixed":
        capability("DALI decodes on the CPU")
    try:
        decode_with_dali(device)
    except Exception as error:
        raise Off(f"DALI {dali.__version__} cannot decode a JPEG: {one_line(error)}", remedy) from None
    return "on", f"DALI {dali.__version__} decoded a JPEG"


def jpeg_decoder() -> Answer:
    """Whether the GPU has a JPEG engine."""
    found = capability("it is a part of the GPU")
    written = f"compute capability {found[0]}.{found[1]}"
    if found in WITH_JPEG_DECODER:
        return "on", f"{written} has NVJPG engines, which DALI uses for baseline JPEGs"
    if found < (8, 0) or found == (8, 6):
        raise Off(
            f"{written} has no JPEG engine; the GPU's cores decode, and data.hw_decoder_load changes nothing",
            "a GPU like the A100, A30, H100 or newer",
        )
    return "info", f"{written}: whether there is a JPEG engine depends on the model"


def nvjpeg() -> Answer:
    """Whether the JPEG library decodes a part of an image with fancy upsampling, as random crops ask for."""
    version = version_of("nvidia-nvjpeg")
    if tuple(int(part) for part in version.split(".")[:2]) < REGIONS_WITH_FANCY_UPSAMPLING:
        raise Off(
            f"nvJPEG {version}: below 13.2 it gets the edges of parts of images wrong with fancy upsampling, so that "
            "random crops are left to a slower decoder",
            "pip install 'nvidia-nvjpeg>=13.2', or data.fancy_upsampling=false",
        )
    return "on", f"nvJPEG {version} decodes parts of images with fancy upsampling"


def decode_with_dali(device: str) -> None:
    """Decode one image on "cpu" or "mixed" (GPU); raises what DALI raises."""
    import numpy as np
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None if device == "cpu" else 0)
    def pipeline():
        encoded = fn.external_source(lambda: [np.frombuffer(TINY_JPEG, np.uint8)])
        return fn.decoders.image(encoded, device=device)

    pipe = pipeline()
    pipe.build()
    pipe.run()
