"""PipeFusion: displaced patch pipeline parallelism (arXiv 2405.14430).

The transformer's blocks are divided into stages, one per rank, and the image into patches. Stages work on different
patches at the same time. A patch attends to the fresh keys and values of the patches before it, and to stale keys and
values, from the previous step, of the patches after it:

    K/V of patch j, as patch m sees them at step t  =  those of step t if j <= m, else those of step t-1

Tokens of the text and of reference images run with patch 0, so their keys and values are always those of step t. The
result depends only on the numbers of patches and of synchronous (warm-up) steps, not on the stages or on timing.

A stand-in for the scheduler makes the pipeline loop over N x M sub-steps, one for each timestep and patch
(``scheduler.py``). Each sub-step runs the transformer's forward on one patch: ``stage.py`` skips the blocks of other
stages (``blocks.py``) and sends the tokens to the next stage (``channel.py``).
"""
