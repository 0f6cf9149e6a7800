"""NVIDIA's apex, whose optimizers a run may ask for: which they are, and how it is built."""

APEX_CLASSES = {
    "apex_lamb": "FusedLAMB",
    "apex_novograd": "FusedNovoGrad",
    "apex_sgd": "FusedSGD",
    "apex_adam": "FusedAdam",
}
"""`optimizer.name` and the class in `apex.optimizers`."""
APEX_BUILD = (
    "on a machine with nvcc of torch's CUDA version: git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation . (the 'apex' on PyPI is another project)"
)
