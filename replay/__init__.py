"""Recompute Loss Change Allocation from a recorded run; results go to shards."""
