"""The float32 masters that fairseq keeps beside a 16-bit model, by the names of the model's parameters."""

from __future__ import annotations

from typing import Any

import torch

from recorder.errors import UsageError
from recorder.masters import views_of


def fairseq_masters(trainer: Any) -> dict[str, torch.Tensor]:
    """Find the tensors that a trainer's optimizer updates in place of the model's own.

    Parameters
    ----------
    trainer
        A ``fairseq.trainer.Trainer`` with its model and its optimizer.

    Returns
    -------
    dict of str to torch.Tensor
        Parameter name to its float32 master, or to the view of its part of the flat master of its device. Empty where
        there are none: in float32, under ``--amp``, and with the memory-efficient optimizers, which update the 16-bit
        parameters themselves.

    Raises
    ------
    UsageError
        If the criterion has masters too: its parameters are not recorded.
    """
    masters = getattr(trainer.optimizer, "fp32_params", None)
    if masters is None:
        return {}
    names = {id(parameter): name for name, parameter in trainer.get_model().named_parameters()}
    of_model = trainer.optimizer.fp16_params
    foreign = sum(id(parameter) not in names for parameter in of_model)
    if foreign:
        message = (
            f"the optimizer updates {foreign} tensors that are no parameters of the model (the criterion has some of "
            "its own); such a training is not recorded"
        )
        raise UsageError(message)
    if isinstance(masters, dict):
        # One flat master for each device, in the order of the parameters on it.
        found: dict[str, torch.Tensor] = {}
        for device, flat in masters.items():
            on_device = {
                names[id(parameter)]: parameter
                for parameter in of_model
                if len(masters) == 1 or parameter.device.index == device
            }
            found |= views_of(flat, on_device)
        return found
    return {names[id(parameter)]: master for parameter, master in zip(of_model, masters, strict=True)}
