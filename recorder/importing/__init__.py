"""Make a run of path ``chord`` of checkpoints that exist already.

One file for each kind of checkpoints; no trainer's library is imported, and no code that a file brings along runs.
"""
