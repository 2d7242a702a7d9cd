"""``xdit serve``: OpenAI's images and videos API in front of ranks that stay.

One HTTP process (``app.py``, ``page.py``) accepts requests as jobs (``server.py``, ``jobs.py``). A task of it
(``engine.py``) starts the ranks, hands calls to them, and starts them anew when one ends or hangs. Each rank
(``worker.py``) has a wrapped pipeline, and no state that outlives a call. All of the HTTP process runs in one event
loop: what does not wait is not interrupted, and needs no lock.
"""
