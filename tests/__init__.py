"""The tests, in the same tree as the code; the folders below have no __init__.py, or they would hide our packages."""
