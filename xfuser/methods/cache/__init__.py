"""Step caching: forwards that skip blocks, and reuse what these blocks added in an earlier step.

Diffusers implements caches as hooks on a transformer's modules. This package makes them decide alike on all ranks
(``caching.py``, ``means.py``), counts what they skip (``use.py``), and adds the caches that flags request
(``added.py``). It implements what Diffusers does not have: a cache whose blocks may be on several stages
(``stack.py``), which decides by TeaCache's rule or, under PipeFusion, by that of First-Block-Cache (``rules.py``).
"""
