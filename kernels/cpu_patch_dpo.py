"""C++ kernels for CPU tensors, bound with ctypes.

Every function takes 5-D strided views [N, C, F, H, W] whose device and dtype have been checked; nothing here is
differentiable.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

LINKS = ("sigmoid", "conservative", "robust", "hinge", "ipo", "kto", "poly")
INSTRUCTION_SETS = ("portable", "AVX2", "AVX-512")

_DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_STATUS = {
    1: MemoryError("halo_fast C++ kernels: not enough memory for the workspace"),
    2: TypeError("halo_fast C++ kernels: unknown dtype"),
    3: ValueError("halo_fast C++ kernels: unknown link"),
}


def _accumulate_dtype(*views: Tensor) -> torch.dtype:
    """In which sums are taken: float64 if a view is float64, else float32."""
    return torch.float64 if torch.float64 in [view.dtype for view in views] else torch.float32


def _bind(path: str) -> ctypes.CDLL:
    """The library with the types of its functions' arguments."""
    library = ctypes.CDLL(path)
    integer, pointer = ctypes.c_int, ctypes.c_void_p
    library.halo_patch_forward.argtypes = [pointer, integer, *[pointer] * 5]
    library.halo_patch_backward.argtypes = [pointer, integer, *[pointer] * 6]
    library.halo_gran_dpo_table.argtypes = [integer, integer] + [pointer] * 8 + [integer] + [pointer] * 6
    library.halo_instruction_set.argtypes = [integer]
    return library


@functools.cache
def _library() -> ctypes.CDLL:
    """The built library; ImportError if there is none."""
    # find_spec is right for wheels, sdists and editable installs, where the library does not lie beside this file.
    spec = importlib.util.find_spec(f"{__package__}._cpu")
    if spec is None or spec.origin is None:
        raise ImportError(
            "the C++ kernels were not built: install halo_fast with a C++ compiler "
            "and without -Ccmake.define.HALO_FAST_CPU=OFF"
        )
    return _bind(spec.origin)


def unavailable(device: torch.device) -> str | None:
    """Why the C++ kernels cannot run on `device`, or None."""
    if device.type != "cpu":
        return f"they run on cpu tensors only, not on {device.type}"
    try:
        _library()
    except (ImportError, OSError) as error:
        return str(error)
    return None


def instruction_set(wanted: str | None = None) -> str:
    """The vector instructions in use; `wanted` restricts them (to nothing the machine lacks)."""
    return INSTRUCTION_SETS[_library().halo_instruction_set(-1 if wanted is None else INSTRUCTION_SETS.index(wanted))]


def describe() -> str:
    """Instruction set and threads, in words."""
    threads = (
        f"{torch.get_num_threads()} threads of torch's OpenMP"
        if _library().halo_has_openmp()
        else "1 thread, no OpenMP"
    )
    return f"C++, {instruction_set()}, {threads}"


def _sizes(shape: Sequence[int], grid: Sequence[int], *latents: Tensor) -> ctypes.Array[ctypes.c_int64]:
    """Shape and grid, then the strides of each latent."""
    numbers = [*shape, *grid]
    for latent in latents:
        numbers += latent.stride()
    return (ctypes.c_int64 * len(numbers))(*numbers)


@functools.cache
def _dtypes(*dtypes: torch.dtype) -> ctypes.Array[ctypes.c_int]:
    """The dtypes by their numbers in the library, which only reads them."""
    return (ctypes.c_int * len(dtypes))(*(_DTYPES[dtype] for dtype in dtypes))


def _check(status: int) -> None:
    """Raise what a status other than 0 means."""
    if status:
        raise _STATUS[status]


def _forward(policy: Tensor, reference: Tensor | None, target: Tensor, grid: Sequence[int]) -> Tensor:
    """The log-ratios of the patches or, without a reference, their errors, [N, f, h, w]."""
    views = policy, policy if reference is None else reference, target
    out = policy.new_empty((policy.shape[0], *grid), dtype=_accumulate_dtype(*views))
    if out.numel() == 0:
        return out
    status = _library().halo_patch_forward(
        _dtypes(*[view.dtype for view in views]),
        torch.get_num_threads(),
        _sizes(policy.shape, grid, *views),
        policy.data_ptr(),
        None if reference is None else reference.data_ptr(),
        target.data_ptr(),
        out.data_ptr(),
    )
    _check(status)
    return out


def patch_log_ratio(policy: Tensor, reference: Tensor, target: Tensor, grid: Sequence[int]) -> Tensor:
    """E_p(reference) - E_p(policy) in the factored form, [N, f, h, w]."""
    return _forward(policy, reference, target, grid)


def patch_error(prediction: Tensor, target: Tensor, grid: Sequence[int]) -> Tensor:
    """Mean squared error of each patch, [N, f, h, w]."""
    return _forward(prediction, None, target, grid)


def patch_error_backward(grad: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """2 (prediction - target) grad_p / Z_p, in the dtype and memory order of prediction; grad is [N, f, h, w]."""
    return gran_dpo_backward(None, grad, prediction, target)


def gran_dpo_backward(factor: Tensor | None, grad: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """As patch_error_backward, of factor * grad with a 0-d factor (None is 1)."""
    gradient = torch.empty_like(prediction)
    if gradient.numel() == 0:
        return gradient
    dtype = _accumulate_dtype(prediction, target)
    grad = grad.to(dtype).contiguous()
    factor = None if factor is None else factor.to(dtype)
    status = _library().halo_patch_backward(
        _dtypes(prediction.dtype, target.dtype),
        torch.get_num_threads(),
        _sizes(prediction.shape, grad.shape[1:], prediction, target, gradient),
        None if factor is None else factor.data_ptr(),
        grad.data_ptr(),
        prediction.data_ptr(),
        target.data_ptr(),
        gradient.data_ptr(),
    )
    _check(status)
    return gradient


def gran_dpo_table(
    log_ratio: Tensor,
    patch_rewards: Tensor | None,
    video_rewards: Tensor | None,
    logit_scale: Tensor | None,
    error: Tensor | None,
    loser_scale: Tensor | None,
    latent_shape: Sequence[int],
    link_name: str,
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The H1 loss and its coefficients from the table of log-ratios: see halo_fast.loss.reference.gran_dpo_table."""
    if len(numbers) != 13:  # missing ones would be zeros, without a word
        raise ValueError(f"numbers: expected 13, got {len(numbers)}")
    samples, *grid = log_ratio.shape
    omega = None if logit_scale is None or len(logit_scale) == 2 else logit_scale[2]
    # Names keep the contiguous tables alive while the kernel reads them.
    tables = [
        None if table is None else table.contiguous()
        for table in (log_ratio, patch_rewards, video_rewards, logit_scale, omega, error, loser_scale)
    ]
    pairs = samples // 2
    outputs = [log_ratio.new_empty(shape) for shape in ((), (samples, *grid), (pairs,), (pairs, *grid), (pairs,))]
    status = _library().halo_gran_dpo_table(
        _DTYPES[log_ratio.dtype],
        torch.get_num_threads(),
        _sizes((samples, *latent_shape), grid),
        *(None if table is None else table.data_ptr() for table in tables),
        LINKS.index(link_name),
        (ctypes.c_double * 13)(*numbers),
        *(output.data_ptr() for output in outputs),
    )
    _check(status)
    loss, coefficients, video_logits, patch_logits, active = outputs
    return loss, coefficients, video_logits, patch_logits, active
