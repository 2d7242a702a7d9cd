"""Step caching: forwards that leave blocks out, and reuse what these added in an earlier step.

Diffusers' own caches do it, as hooks on a transformer's modules. Here is what they need to decide alike on all ranks
(``caching.py``, ``means.py``), a count of what they left out (``use.py``), the caches that flags ask for
(``added.py``), and what Diffusers does not have: TeaCache (``teacache.py``), and a cache whose blocks may be on several
stages (``stack.py``), which First-Block-Cache goes by under PipeFusion (``first_block.py``).
"""
