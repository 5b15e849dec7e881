"""What every worker of tests.worker_pool needs, imported once, by the process that they are forked from. Starts no thread."""

import gc

import tests.worker_pool  # noqa: F401

gc.freeze()  # what is shared stays shared
