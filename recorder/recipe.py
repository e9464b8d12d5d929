"""What the bits of a result depend on: device, threads, processor, library versions.

The same computation gives the same bits only within one recipe; torch promises no more than that.
"""

from __future__ import annotations

import platform
from typing import Any

import torch


def current_recipe(device: torch.device) -> dict[str, Any]:
    """Describe how this process computes now.

    Parameters
    ----------
    device
        Where the model is.

    Returns
    -------
    dict
        JSON types only; equal dicts mean that equal bits are to be expected.
    """
    on_gpu = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "tf32": bool(torch.backends.cuda.matmul.allow_tf32),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 (not a user's file)
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
