"""Load at full speed with one operation, made with locust for machines without wrk.

`python load_locust.py ADDRESS CONNECTIONS SECONDS OPERATION TOKENS FIRST_ID TASKS_PER_USER`
"""

import sys
import time

import gevent
from locust import FastHttpUser, task
from locust.env import Environment
from workload import print_result, requests

address, connections, seconds, *what = sys.argv[1:]
upcoming = requests(*what)
latencies: list[float] = []
failures = 0


class Client(FastHttpUser):
    """One connection that never pauses."""

    host = address

    @task
    def ask(self) -> None:
        """Send the next request."""
        one = next(upcoming)
        self.client.request(
            one.method, one.path, headers=one.headers, data=one.body or None, name=what[0]
        )


def record(response_time: float, exception: Exception | None, **_: object) -> None:
    """Keep the exact time (given in ms), because locust's own statistics round it."""
    global failures  # noqa: PLW0603  locust's listeners are functions
    latencies.append(response_time / 1000)
    failures += exception is not None


environment = Environment(user_classes=[Client])
environment.events.request.add_listener(record)
runner = environment.create_local_runner()
start = time.perf_counter()
runner.start(int(connections), spawn_rate=int(connections))
gevent.sleep(float(seconds))
print_result(latencies, time.perf_counter() - start, failures)
runner.quit()
