"""What is left of a step once it has been predicted from the one or two steps before it.

A float's bit pattern is read as an integer that grows with the float, so that two parameters close to each other are
integers close to each other. The integer of the new step is predicted from the two before it, and only the residual,
folded to an unsigned number that is small where the prediction was good, is left to be stored. All of it is exact
integer arithmetic that wraps around, so every bit pattern comes back, NaN payloads too. The format page is
``docs/formats/step-coding.md``. Ground floor: no torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.unsignedinteger[Any]]
_Integers = npt.NDArray[np.signedinteger[Any]]

LARGEST_SHIFT = 7  # the last that the format allows
# Shift 0 predicts no change. Momentum of 0.9, the usual one, makes 3 and 4 the best; a rising learning rate 6.
_SHIFTS_TRIED = (0, 1, 2, 3, 4, 6)
_SAMPLE = 2048  # entries of a block by which its prediction is chosen


class Predictor:
    """Turns blocks of bit patterns into residuals and back; scratch memory is allocated once.

    Parameters
    ----------
    dtype
        The unsigned dtype of the bit patterns.
    floats
        Whether the bit patterns are of floats (sign, exponent, mantissa) and not of plain integers.
    block_size
        The most entries in a block.
    """

    def __init__(self, dtype: np.dtype[Any], floats: bool, block_size: int) -> None:
        self._signed = np.dtype(f"i{dtype.itemsize}")
        self._unsigned = dtype
        self._floats = floats
        self._sign_shift = self._signed.type(8 * dtype.itemsize - 1)
        self._magnitude_mask = self._signed.type(np.iinfo(self._signed).max)
        self._shifts = np.array(_SHIFTS_TRIED, self._signed)[:, np.newaxis]
        self._residual = np.empty(block_size, self._signed)
        self._previous = np.empty(block_size, self._signed)
        self._step = np.empty(block_size, self._signed)
        self._temporary = np.empty(block_size, self._signed)

    def choose(self, current: Bits, previous: Bits, before_previous: Bits | None) -> tuple[int, float]:
        """Choose by a sample which share of the last step is predicted to come again.

        Parameters
        ----------
        current
            Bit patterns of the block in the step to be coded, shape (n,), n > 0.
        previous
            Those of the step before, shape (n,).
        before_previous
            Those of the step before that one, shape (n,), or None if there is none.

        Returns
        -------
        shift : int
            The prediction: 0 for no change, else the last step's change d less ``d >> shift``.
        magnitude : float
            How many bits the residuals have then: the mean of log2(1 + folded residual) over the sample.
        """
        # An odd stride meets every column of a matrix, whose rows mostly are a power of two long.
        sampled = slice(None, None, current.size // _SAMPLE | 1)
        before = self._integers(previous[sampled])
        residual = self._integers(current[sampled]) - before
        if before_previous is None:
            residual = residual[np.newaxis]
        else:
            step = before - self._integers(before_previous[sampled])
            residual = residual - (step - (step >> self._shifts))
        folded = ((residual << 1) ^ (residual >> self._sign_shift)).view(self._unsigned)
        magnitudes = np.log2(folded.astype(np.float32) + 1).mean(axis=1)
        best = int(magnitudes.argmin())
        return _SHIFTS_TRIED[best], float(magnitudes[best])

    def residual(self, current: Bits, previous: Bits, before_previous: Bits | None, shift: int) -> Bits:
        """Return the folded residuals of a block.

        Parameters
        ----------
        current
            Bit patterns of the block in the step to be coded, shape (n,).
        previous
            Those of the step before, shape (n,).
        before_previous
            Those of the step before that one, shape (n,); may be None where `shift` is 0.
        shift
            The prediction, as `choose` returns it.

        Returns
        -------
        ndarray
            Shape (n,), of the dtype of the bit patterns: scratch memory, good until the next call.
        """
        residual, temporary = self._residual[: current.size], self._temporary[: current.size]
        self._to_integers(current, residual)
        np.subtract(residual, self._predict(previous, before_previous, shift), out=residual)
        np.right_shift(residual, self._sign_shift, out=temporary)
        np.left_shift(residual, 1, out=residual)
        np.bitwise_xor(residual, temporary, out=residual)
        return residual.view(self._unsigned)

    def restore(self, folded: Bits, previous: Bits, before_previous: Bits | None, shift: int, out: Bits) -> None:
        """Undo `residual`.

        Parameters
        ----------
        folded
            The folded residuals, shape (n,). Overwritten.
        previous
            Bit patterns of the step before, shape (n,).
        before_previous
            Those of the step before that one, shape (n,); may be None where `shift` is 0.
        shift
            The prediction that the block was coded with.
        out
            Where the bit patterns go, shape (n,). May be `previous` or `before_previous` itself.
        """
        prediction = self._predict(previous, before_previous, shift)
        temporary = self._temporary[: folded.size].view(self._unsigned)
        np.bitwise_and(folded, 1, out=temporary)
        np.negative(temporary, out=temporary)
        np.right_shift(folded, 1, out=folded)
        np.bitwise_xor(folded, temporary, out=folded)
        residual = folded.view(self._signed)
        np.add(residual, prediction, out=residual)
        self._to_integers(folded, out.view(self._signed))

    def _predict(self, previous: Bits, before_previous: Bits | None, shift: int) -> _Integers:
        prediction = self._previous[: previous.size]
        self._to_integers(previous, prediction)
        if shift:
            assert before_previous is not None, "a step that continues another needs both steps before it"
            step, temporary = self._step[: previous.size], self._temporary[: previous.size]
            self._to_integers(before_previous, step)
            np.subtract(prediction, step, out=step)
            np.right_shift(step, shift, out=temporary)
            np.add(prediction, step, out=prediction)
            np.subtract(prediction, temporary, out=prediction)
        return prediction

    def _to_integers(self, bits: Bits, out: _Integers) -> None:
        # Flips all bits but the sign of a negative float, and so undoes itself.
        signed = bits.view(self._signed)
        if not self._floats:
            np.copyto(out, signed)
            return
        flips = self._temporary[: bits.size]
        np.right_shift(signed, self._sign_shift, out=flips)
        np.bitwise_and(flips, self._magnitude_mask, out=flips)
        np.bitwise_xor(signed, flips, out=out)

    def _integers(self, bits: Bits) -> _Integers:
        integers = np.empty(bits.size, self._signed)
        self._to_integers(bits, integers)
        return integers
