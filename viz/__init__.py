"""Draw a run's ledger: the figures of the paper, the check that the books balance, the table of totals.

`viz.select` computes the numbers of every figure, `viz.figures` draws them, `viz.table` writes them down.
Needs neither torch nor dask: a cube is all it reads.
"""
