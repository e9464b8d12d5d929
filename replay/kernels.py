"""Which kernels torch may compute a loss with: those that replay rules out, and what the recipe says of the rest."""

from __future__ import annotations

from typing import Any

import torch


def rule_out_inexact() -> None:
    """Rule out, for this process, kernels that would make the residual of a step another number than it is.

    TF32 on GPUs, whose ten bits of mantissa would drown it; and the fast path of torch's own encoder layers and
    attention, which passes without gradient take in evaluation mode, and no others: it ignores autocast, leaves zeros
    at padded places, and so measures losses that are not those of the gradients.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.mha.set_fastpath_enabled(False)


def attention(device: torch.device) -> dict[str, Any]:
    """Describe which kernels attention may be computed with, as this process is set now.

    Parameters
    ----------
    device
        Where the model is.

    Returns
    -------
    dict
        ``scaled_dot_product``: the names of the kernels that `torch.nn.functional.scaled_dot_product_attention` may
        choose from, given shapes and dtypes; ``fastpath``: whether torch's own layers may take their fast path.
    """
    # They are called after the GPU, and the first two hold on processors too.
    switches: Any = torch.backends.cuda
    enabled = {"math": switches.math_sdp_enabled(), "flash": switches.flash_sdp_enabled()}
    if device.type == "cuda":
        enabled["mem_efficient"] = switches.mem_efficient_sdp_enabled()
        enabled["cudnn"] = switches.cudnn_sdp_enabled()
    return {
        "scaled_dot_product": sorted(name for name, on in enabled.items() if on),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
    }
