"""``xdit serve``: OpenAI's images and videos API in front of ranks that stay.

One HTTP process (``app.py``, ``page.py``) accepts requests as jobs (``requests.py``, ``jobs.py``). A thread of it
(``engine.py``) starts the ranks, hands them one batch after the other, and starts them anew when one ends or hangs.
Each rank (``worker.py``) has a wrapped pipeline, and no state that outlives a batch.
"""
