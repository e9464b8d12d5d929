"""The rows of the ledger: the run's parameter table, in which the uses of a tied parameter are rows of their own.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

from recorder.table import Parameter, split_by_use

SPLIT, WHOLE = "split", "whole"
"""What ``--tied-weights`` may be."""


def ledger(parameters: Iterable[Parameter], whole: Collection[str] = ()) -> tuple[Parameter, ...]:
    """List the rows that LCA is told for.

    Parameters
    ----------
    parameters
        The run's parameter table.
    whole
        Names of tied parameters whose uses are not told apart.

    Returns
    -------
    tuple of Parameter
        In the table's order, without `uses`: a trained parameter that has them is replaced by them, unless it is in
        `whole`. Of a table without uses its own rows.
    """
    return split_by_use(
        row if row.trained and row.name not in whole else dataclasses.replace(row, uses=()) for row in parameters
    )


def sharers(rows: Iterable[Parameter]) -> dict[str, str]:
    """Name the rows that share their values with another row.

    Parameters
    ----------
    rows
        Of the ledger.

    Returns
    -------
    dict of str to str
        Name of every use of a tied parameter but the first, to the parameter's own name.
    """
    return {row.name: row.tied_to for row in rows if row.tied_to is not None}
