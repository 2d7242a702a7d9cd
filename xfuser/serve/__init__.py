"""``xdit serve``: OpenAI's images and videos API in front of persistent ranks.

One HTTP process (``app.py``, ``page.py``) accepts requests as jobs (``server.py``, ``jobs.py``). One of its tasks
(``engine.py``) starts the ranks, sends calls to them, and restarts them when one ends or hangs. Each rank
(``worker.py``) has a wrapped pipeline, and no state that outlives a call. The whole HTTP process runs in one event
loop, so code between two awaits is not interrupted and needs no lock.
"""
