"""Run tasks in worker processes through dask.distributed: the only place of replay that names dask.

By default a scheduler in this process, with workers of our own (`replay.workers`), one thread of torch each, on
loopback with TLS and without a dashboard: a default LocalCluster lets any local user run code as its owner. Or any
scheduler that is there already, with whatever workers it has.

A worker is given one chunk at a time. So a worker's death is blamed on the chunk it was at, not on those that waited,
and what is lost with this process is the chunks in the making.
"""

from replay.cluster.dispatch import run_in_cluster

__all__ = ["run_in_cluster"]
