"""The commands of ``python -m recorder``, one to a file: what each takes, and what it does."""

PROGRAM = "python -m recorder"
