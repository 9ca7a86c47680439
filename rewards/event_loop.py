"""One event loop for all asynchronous rewards, whoever calls them: a client that a reward keeps open belongs to it."""

import asyncio
import atexit
from collections.abc import Coroutine
from concurrent.futures import Future
from functools import cache
from typing import Any


def submit(coroutine: Coroutine) -> Future:
    """Run a coroutine in the loop, which has a thread of its own, so that callers may be inside of another loop."""
    return asyncio.run_coroutine_threadsafe(coroutine, _loop())


@cache
def _loop() -> asyncio.AbstractEventLoop:
    from trl.trainer.utils import shutdown_event_loop_in_daemon, start_event_loop_in_daemon

    thread, loop, ready = start_event_loop_in_daemon("papertrl-rewards")
    ready.wait()
    atexit.register(shutdown_event_loop_in_daemon, thread, loop)
    return loop


async def together(coroutines: list[Coroutine]) -> list[Any]:
    """Results of coroutines that run at the same time."""
    return await asyncio.gather(*coroutines)
