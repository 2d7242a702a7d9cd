"""PipeFusion: displaced patch pipeline parallelism (arXiv 2405.14430).

The transformer's blocks are divided into stages, one a rank, and the image into patches. Stages work on different
patches at the same time. What a patch attends to outside of itself are the keys and values that patches before it left
in this step, and those after it in the previous step:

    K/V of patch j, as patch m sees them at step t  =  those of step t if j <= m, else those of step t-1

and those of text tokens, which run with patch 0, from step t. So the result depends on the number of patches and of
synchronous first steps alone; never on the number of stages or on timing.

A pipeline's loop over N timesteps is led through N x M sub-steps, one for each patch, by a stand-in for its scheduler
(``scheduler.py``). Each sub-step runs the transformer's forward on one patch: ``stage.py`` leaves the blocks of other
stages out, and hands the tokens on (``channel.py``).
"""
