"""The core of the API's tests, the two-user cases and the erasure race, on Citus."""

# ruff: noqa: E402, F403  their tests are collected here once more, but only where there is a cluster
from support.requirements import citus_coordinator

citus_coordinator()

from api.test_account import *
from api.test_isolation import *
from api.test_list import *
from api.test_tasks import *
from database.test_versions import *

# PostgreSQL's own statistics, which a coordinator does not gather from the shards.
del test_every_update_is_a_heap_only_tuple  # noqa: F821
