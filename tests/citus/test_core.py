"""The core of the API's tests, the two-user cases and the erasure race, on Citus."""

# ruff: noqa: E402, F403  pytest collects these tests here again, but only with a cluster
from support.requirements import citus_coordinator

citus_coordinator()

from api.test_account import *
from api.test_isolation import *
from api.test_list import *
from api.test_tasks import *
from database.test_versions import *

# It reads PostgreSQL's statistics, and a coordinator does not collect them from the shards.
del test_every_update_is_a_heap_only_tuple  # noqa: F821
