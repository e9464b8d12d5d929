"""Every figure, by name: each function takes cubes by run label and returns a `matplotlib.figure.Figure`.

None reads or writes a file, none touches pyplot's state. In a notebook::

    figure = viz.figures.plot_figure1({"run": cube}, data="probe")
"""

from viz.balance import plot_balance as plot_balance
from viz.figure1 import plot_figure1 as plot_figure1

__all__ = ["plot_balance", "plot_figure1"]
