"""The model and the optimizer under watch: what the recorder reads from them at each step.

Only reads: copies of parameters, which of them have a gradient, the state of the random generators, buffers. What is
copied of a parameter is the tensor that the optimizer updates for it: its float32 master where it has one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from recorder.autocast import Autocast
from recorder.masters import masters_by_first_name
from recorder.optimizerfacts import describe_optimizer
from recorder.ownership import Ownership
from recorder.sharded import is_sharded, whole
from recorder.unrecorded import Unrecorded
from recorder.usermap import table_of

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from recorder.manifest import OptimizerFacts
    from recorder.usermap import UserMap


class Watched:
    """A live model and the optimizer that updates it.

    Parameters
    ----------
    model
        The model in training.
    optimizer
        Any torch optimizer over its parameters, or over their masters.
    left_out
        Names of parameters that are not to be recorded.
    masters
        Parameter name to the tensor that the optimizer updates for it, where that is not the model's own: a float32
        copy of a 16-bit parameter, or a view of its part of a flat one.
    user_map
        The user's own map, where there is one.

    Attributes
    ----------
    table : tuple of Parameter
        The parameter table; `settle_table` and `find_first_gradients` say which parameters are trained.
    device : torch.device
        Where the model is.
    sharded : bool
        Whether parameters are spread over processes.
    backward_seen : bool
        Whether a gradient has come in since this was last set to False.
    autocast : Autocast
        In which dtype torch computes; it looks into forward passes until `settle_table`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        left_out: Collection[str] = (),
        masters: Mapping[str, torch.Tensor] | None = None,
        user_map: UserMap | None = None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        tensors = self._tensors = dict(model.named_parameters())
        masters = masters_by_first_name(model, masters or {})
        self._ownership = Ownership(optimizer, tensors, masters)
        self._unrecorded = Unrecorded(model)
        self.table = tuple(
            dataclasses.replace(row, status="not_recorded") if row.name in left_out else row
            for row in table_of(model, user_map, masters=masters)
        )
        self.device = next(iter(tensors.values())).device
        self.autocast = Autocast(model, self.device)
        self.sharded = any(is_sharded(tensor) for tensor in self._ownership.recorded.values())
        self._gathered: dict[str, torch.Tensor] = {}
        self._gathered_state: dict[int, dict[str, Any]] | None = None
        self._held: dict[str, torch.Tensor] = {}
        self._versions: list[int] = []
        self.backward_seen = False
        self._hooks = [
            tensor.register_post_accumulate_grad_hook(self._notice_backward)  # type: ignore[no-untyped-call]
            for tensor in tensors.values()
            if tensor.requires_grad
        ]

    def settle_table(self, *, recorded_buffers: tuple[str, ...] = ()) -> None:
        """Find out, just before the first step, which parameters are trained, and remember what must not change.

        Parameters
        ----------
        recorded_buffers
            Names of buffers that are recorded with every step, and so may change.
            A `UsageError` tells if the optimizer updates tensors that are neither the model's nor its masters.
        """
        with_gradient = self._ownership.with_gradient([parameter.name for parameter in self.table])
        self.table = tuple(
            parameter
            if parameter.name in with_gradient or parameter.status == "not_recorded"
            else dataclasses.replace(parameter, status="untrained")
            for parameter in self.table
        )
        self._unrecorded.remember(self.live(trained=False), recorded_buffers=recorded_buffers)
        self.autocast.release()

    def find_first_gradients(self) -> bool:
        """Find untrained parameters that now have their first gradient.

        Returns
        -------
        bool
            Whether the table has changed.
        """
        untrained = [parameter.name for parameter in self.table if parameter.status == "untrained"]
        if not untrained:
            return False
        late = self._ownership.with_gradient(untrained)
        if late:
            self._unrecorded.leave({name: self._recorded[name] for name in late})
            self.table = tuple(
                dataclasses.replace(parameter, status="trained") if parameter.name in late else parameter
                for parameter in self.table
            )
        return bool(late)

    def _notice_backward(self, tensor: torch.Tensor) -> None:
        self.backward_seen = True

    def release(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self.autocast.release()

    def live(self, *, trained: bool = True) -> dict[str, torch.Tensor]:
        """Give the tensors that are recorded with every step, or the others.

        Parameters
        ----------
        trained
            Which.

        Returns
        -------
        dict of str to torch.Tensor
            Name to the training's own tensor: the parameter, or its master. After `hold` their copies.
        """
        recorded = self._recorded
        return {parameter.name: recorded[parameter.name] for parameter in self.table if parameter.trained == trained}

    def more_may_join(self) -> bool:
        """Say whether a parameter that had no gradient until now could get one.

        Returns
        -------
        bool
            False where all that take a gradient are trained already.
        """
        return any(row.status == "untrained" and self._tensors[row.name].requires_grad for row in self.table)

    def hold(self) -> None:
        """Keep copies of all parameters as they are now, on their device; until `let_go` they are what is read."""
        self._held = {name: tensor.detach().clone() for name, tensor in self._ownership.recorded.items()}

    def let_go(self) -> None:
        """Read the parameters themselves again."""
        self._held = {}

    def note_versions(self) -> None:
        """Note how often each recorded tensor has been written to, as torch counts it."""
        self._versions = [tensor._version for tensor in self._ownership.recorded.values()]

    def moved_since_noted(self) -> bool:
        """Say whether a recorded tensor has been written to since `note_versions`.

        Returns
        -------
        bool
            False also where it was done through its ``data``, which torch does not count.
        """
        return self._versions != [tensor._version for tensor in self._ownership.recorded.values()]

    @property
    def _recorded(self) -> Mapping[str, torch.Tensor]:
        return self._held or self._ownership.recorded

    @contextmanager
    def gathered(self, *, keep: bool) -> Iterator[None]:
        """Put sharded parameters and optimizer state together for a while; all processes call this together.

        Parameters
        ----------
        keep
            Whether this process needs them, for `copies` and `optimizer_state`.

        Yields
        ------
        None
            While they are at hand. Where nothing is sharded, nothing is copied.
        """
        if self.sharded:
            for name, tensor in self._recorded.items():
                complete = whole(tensor)
                if keep:
                    self._gathered[name] = complete.cpu()
            state = {
                index: {key: whole(value) if isinstance(value, torch.Tensor) else value for key, value in entry.items()}
                for index, entry in self.optimizer_state().items()
            }
            self._gathered_state = state if keep else None
        try:
            yield
        finally:
            self._gathered, self._gathered_state = {}, None

    @property
    def frozen(self) -> set[str]:
        """Names of the parameters that take no gradient; the loss may depend on them all the same."""
        # One that takes a gradient and never got one is no part of the loss: fairseq's dead copies, for example.
        return {name for name, tensor in self._tensors.items() if not tensor.requires_grad}

    def copies(self, *, trained: bool) -> dict[str, torch.Tensor]:
        """Copy the trained parameters, or the others, to host memory; sharded ones within `gathered`.

        Parameters
        ----------
        trained
            Which.

        Returns
        -------
        dict of str to torch.Tensor
            Name to copy.
        """
        live = {name: self._gathered.get(name, tensor) for name, tensor in self.live(trained=trained).items()}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in live.items()}

    def skipped(self) -> bool:
        """Say whether the update that just ended did nothing, because a gradient scaler found an overflow.

        Returns
        -------
        bool
            Only for optimizers that the scaler leaves the decision to; others are not called at all.
        """
        found = getattr(self._optimizer, "found_inf", None)
        return found is not None and bool(found.item())

    def gradients_dropped(self) -> bool:
        """Say whether all gradients are gone, so that what was announced before belongs to no update.

        Returns
        -------
        bool
            True if no parameter holds a gradient, or every gradient is zero. Those of masters count too: where a loop
            drops the model's gradients between the micro-batches of an update, the masters gather them.
        """
        return self._ownership.gradients_dropped()

    def gradients_finite(self) -> bool:
        """Say whether the gradients held now are finite.

        What is added to an infinite gradient leaves it infinite. So where gradients were not finite when a micro-batch
        was announced, and are in the next step, they were zeroed in between: the micro-batches announced before belong
        to an update that was skipped.

        Returns
        -------
        bool
            True if no parameter has a gradient with infinity or NaN in it.
        """
        return self._ownership.gradients_finite()

    def gradient_norm(self) -> float:
        """Measure the gradient that the optimizer is about to use.

        Returns
        -------
        float
            Euclidean norm over all parameters, or over their masters; without the scale of a gradient scaler.
        """
        return self._ownership.gradient_norm()

    def random_state(self) -> dict[str, torch.Tensor]:
        """Read the state of torch's generators, which does not advance them.

        Returns
        -------
        dict of str to torch.Tensor
            By the names of `recorder.segments.RANDOM_STATES`.
        """
        state = {"rng_cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    @property
    def unrecorded_changes(self) -> set[str]:
        """Names of buffers and untrained parameters found changed so far."""
        return self._unrecorded.changes

    def find_unrecorded_changes(self) -> bool:
        """Compare buffers and untrained parameters, which no step records, with those before the first step.

        Returns
        -------
        bool
            Whether `unrecorded_changes` has grown.
        """
        return self._unrecorded.find(self.live(trained=False), may_change=self._decaying)

    def _decaying(self) -> set[str]:
        # An untrained master may decay: the loss of a parameter without a gradient does not depend on it.
        untrained = {parameter.name for parameter in self.table if parameter.status == "untrained"}
        return self._ownership.with_master() & untrained

    def optimizer_state(self) -> dict[int, dict[str, Any]]:
        """Take the optimizer's state; what is sharded of it is whole within `gathered`.

        Returns
        -------
        dict
            As ``optimizer.state_dict()["state"]``; empty before its first step.
        """
        if self._gathered_state is not None:
            return self._gathered_state
        state: dict[int, dict[str, Any]] = self._optimizer.state_dict()["state"]
        return state

    def optimizer_facts(self) -> OptimizerFacts:
        """Describe the optimizer.

        Returns
        -------
        OptimizerFacts
            As `recorder.optimizerfacts.describe_optimizer` gives them.
        """
        return describe_optimizer(self._optimizer, self._ownership.names(), fresh=not self.optimizer_state())
