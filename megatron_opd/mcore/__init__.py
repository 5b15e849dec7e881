"""The only package that imports megatron. Where CUDA is absent, its patches must stand before Megatron is first imported."""

import torch

if not torch.cuda.is_available():
    from megatron_opd.mcore import cpu_compat

    cpu_compat.install()
