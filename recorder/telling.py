"""The recorder's lines on standard error, in programs that have set up no logging of their own."""

from __future__ import annotations

import logging

from recorder import commandline

LOG = logging.getLogger("lossledger.recorder")
"""What a recording costs, when it begins; what it took, when it ends."""


class _OnTheTerminal(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # The program may set its logging up later; its own handlers then show the line.
        if not logging.getLogger().handlers:
            commandline.say(f"lossledger: {record.getMessage()}")


def tell_on_the_terminal() -> None:
    """Show what is logged to `LOG` on standard error, unless a handler would see it anyway."""
    if not LOG.hasHandlers():
        LOG.addHandler(_OnTheTerminal())
        LOG.setLevel(logging.INFO)
