"""Counts the bytes of latent-sized tensors that operators read and write."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Bytes of the latents that operators read and write, views apart."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.bytes = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        returned = output if isinstance(output, tuple) else (output,)
        inputs = [x for x in args if isinstance(x, torch.Tensor)]
        known = {x.untyped_storage().data_ptr() for x in inputs}
        outputs = [x for x in returned if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known]
        if outputs:
            self.bytes += sum(x.numel() * x.element_size() for x in inputs + outputs if x.numel() >= self.elements)
        return output
