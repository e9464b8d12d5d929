"""The mean loss on given micro-batches, and its gradient, at any parameters.

Sums and counts, exactly as training normalises them: L = Σ loss sums / Σ predictions over the micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from recorder.errors import FormatError
from replay.between import Between
from replay.dropout import as_recorded
from replay.evaluation import Evaluation, Theta
from replay.products import Projection
from replay.splitting import Pieces
from replay.uses import Uses

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn

    from recorder.table import Parameter
    from recorder.workload import Workload
    from replay.dropout import RandomStates
    from replay.precision import Precision


def set_parameters(parameters: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Copy values into a model's parameters.

    Parameters
    ----------
    parameters
        Name to parameter of a live model.
    values
        A value for each.

    Raises
    ------
    FormatError
        If a parameter has another shape than its value.
    """
    with torch.no_grad():
        for name, parameter in parameters.items():
            shape = values.shape(name) if isinstance(values, Between) else values[name].shape
            if parameter.shape != shape:
                message = (
                    f"parameter {name!r} has shape {tuple(shape)} in the run, but "
                    f"{tuple(parameter.shape)} in the model that the workload builds"
                )
                raise FormatError(message)
            if isinstance(values, Between) and parameter.is_contiguous():
                values.write(name, parameter.detach())
            else:
                parameter.copy_(values[name])


class LossSurface:
    """A model as a function from parameters and micro-batches to loss and gradient.

    Dropout is off, unless an evaluation is given the random states to draw it from.

    Parameters
    ----------
    workload
        Supplies the model and the loss.
    names
        The trained parameters; what `evaluate` returns gradients for.
    fixed
        Values of all other parameters of the run.
    device
        Where to compute.
    precision
        In which numbers.
    uses
        Rows of the ledger for every use but the first of tied parameters whose uses are told apart: `evaluate` returns
        gradients for them, too, and that of the parameter is the one of its first use.

    Attributes
    ----------
    shapes : dict of str to tuple of int
        Name to shape of every parameter of the model, as the workload built it.

    Raises
    ------
    FormatError
        If the model built by the workload lacks a parameter of the run, or has it in another shape.
    """

    def __init__(
        self,
        workload: Workload,
        names: Sequence[str],
        fixed: Mapping[str, torch.Tensor],
        device: torch.device,
        precision: Precision,
        uses: Sequence[Parameter] = (),
    ) -> None:
        self._workload = workload
        self.device = device
        self.precision = precision
        self._model: nn.Module = workload.model().to(device)
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            tensor.data = precision.converted(tensor.data)
        self._model.eval()
        present = dict(self._model.named_parameters())
        self.shapes = {name: tuple(parameter.shape) for name, parameter in present.items()}
        missing = [name for name in (*names, *fixed) if name not in present]
        if missing:
            message = (
                f"the model that the workload builds lacks {len(missing)} parameters of the run, first {missing[0]!r}; "
                "was the model's code changed since the training?"
            )
            raise FormatError(message)
        self._parameters = {name: present[name] for name in names}
        for name, parameter in present.items():
            parameter.requires_grad_(name in self._parameters)
        set_parameters({name: present[name] for name in fixed}, fixed)
        self._uses = Uses(self._model, uses)
        self._with_gradient = {**self._parameters, **self._uses.parameters}
        self._theta: Theta | None = None
        # As they were asked for, and as they go into the model.
        self._micro_batches: tuple[Sequence[Any], Sequence[Any]] = ((), ())
        self._pieces = Pieces(workload, torch.no_grad()(self._measure), precision.epsilon)

    def _stand_at(self, theta: Theta) -> None:
        # A step begins where the one before it, on other examples, has ended.
        if theta is not self._theta:
            self._theta = None
            set_parameters(self._parameters, theta)
            self._theta = theta

    @property
    def inseparable(self) -> Mapping[str, str]:
        """Name of a tied parameter to the reason why its uses cannot be told apart in this model."""
        return self._uses.inseparable

    def together(self) -> AbstractContextManager[None]:
        """Tie the uses of tied parameters again, for a while.

        Returns
        -------
        context manager
            In it the model is as the workload built it, and `evaluate` returns no gradients of `uses`.
        """
        return self._uses.together()

    def hold(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Set buffers of the model, for all evaluations to come.

        Parameters
        ----------
        buffers
            Name to value.

        Raises
        ------
        FormatError
            If the model has no such buffer.
        """
        present = dict(self._model.named_buffers())
        missing = [name for name in buffers if name not in present]
        if missing:
            message = (
                f"the model that the workload builds lacks {len(missing)} buffers of the run, first {missing[0]!r}"
            )
            raise FormatError(message)
        set_parameters({name: present[name] for name in buffers}, buffers)

    def evaluate(
        self,
        theta: Mapping[str, torch.Tensor],
        micro_batches: Sequence[Any],
        direction: Projection | None = None,
        *,
        states: RandomStates | None = None,
    ) -> Evaluation:
        """Compute loss and gradient at parameters `theta`.

        Parameters
        ----------
        theta
            Every trained parameter. The same object stands for the same values.
        micro_batches
            On this surface's device.
        direction
            A tensor for every trained parameter, to tell the micro-batches apart along it.
        states
            For every micro-batch the random states that its dropout is drawn from, in training mode; None for dropout
            off.

        Returns
        -------
        Evaluation
            Mean loss and its gradient.
        """
        self._stand_at(theta)
        micro_batches = self._converted(micro_batches)
        loss_sum, counts, reached = self._pieces.fit(
            micro_batches, lambda: self._accumulate(len(micro_batches), direction, states), whole=states is not None
        )
        predictions = sum(counts)
        gradient = self._gradients()
        if gradient:
            # One call, for a net of many small parameters.
            torch._foreach_div_(list(gradient.values()), predictions)
        self._forget_gradients()
        return Evaluation(
            loss=loss_sum / predictions,
            gradient=gradient,
            counts=tuple(counts),
            along=None if direction is None else direction.of_each(reached),
            pieces=self._pieces.most,
        )

    def _converted(self, micro_batches: Sequence[Any]) -> Sequence[Any]:
        # The same ones are asked for at every point of a step, and on a fixed loss data at every step.
        asked, ready = self._micro_batches
        if micro_batches is not asked:
            ready = [self.precision.converted(micro_batch) for micro_batch in micro_batches]
            self._micro_batches = (micro_batches, ready)
        return ready

    def _accumulate(
        self, micro_batches: int, direction: Projection | None, states: RandomStates | None
    ) -> tuple[float, list[float], list[torch.Tensor]]:
        # From the start: a pass that ran out of memory leaves gradients of some parameters behind.
        self._forget_gradients()
        losses, counts, reached = [], [], []
        with self._mode(states) as draw:
            for position in range(micro_batches):
                draw(position)
                of_micro_batch = 0.0
                for piece in self._pieces.each(position):
                    with self.precision.forward(self.device):
                        loss, count = self._workload.loss(self._model, piece)
                    loss.backward()  # type: ignore[no-untyped-call]
                    losses.append(loss.detach())
                    of_micro_batch += float(count)
                counts.append(of_micro_batch)
                if direction is not None:
                    # Gradients add up over the micro-batches; so do their products with the direction.
                    reached.append(direction.dots(self._gradients()))
        # Looked at when all passes are under way: a GPU would stand still at each of them otherwise.
        return sum(map(float, losses)), counts, reached

    def _forget_gradients(self) -> None:
        for parameter in self._with_gradient.values():
            parameter.grad = None

    def _gradients(self) -> dict[str, torch.Tensor]:
        return {name: tensor.grad for name, tensor in self._with_gradient.items() if tensor.grad is not None}

    def loss(
        self, theta: Mapping[str, torch.Tensor], micro_batches: Sequence[Any], *, states: RandomStates | None = None
    ) -> float:
        """Compute the mean loss alone.

        Parameters
        ----------
        theta, micro_batches, states
            As for `evaluate`.

        Returns
        -------
        float
            In nats.
        """
        self._stand_at(theta)
        micro_batches = self._converted(micro_batches)
        # Where no gradient is wanted torch may choose another attention kernel, which draws another dropout.
        with torch.set_grad_enabled(states is not None):
            loss_sum, predictions = self._pieces.fit(
                micro_batches, lambda: self._total(len(micro_batches), states), whole=states is not None
            )
        return loss_sum / predictions

    def _total(self, micro_batches: int, states: RandomStates | None) -> tuple[float, float]:
        loss_sum, predictions = 0.0, 0.0
        with self._mode(states) as draw:
            for position in range(micro_batches):
                draw(position)
                for piece in self._pieces.each(position):
                    loss, count = self._measure(piece)
                    loss_sum += loss
                    predictions += count
        return loss_sum, predictions

    def _measure(self, micro_batch: Any) -> tuple[float, float]:
        with self.precision.forward(self.device):
            loss, count = self._workload.loss(self._model, micro_batch)
        return float(loss.detach()), float(count)

    def _mode(self, states: RandomStates | None) -> AbstractContextManager[Callable[[int], None]]:
        if states is None:
            return nullcontext(lambda position: None)
        return as_recorded(self._model, states, self.device)
