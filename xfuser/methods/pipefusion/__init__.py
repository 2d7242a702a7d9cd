"""PipeFusion: displaced patch pipeline parallelism (arXiv 2405.14430).

The transformer's blocks are divided into stages, one a rank, and the image into patches. Stages work on different
patches at the same time. What a patch attends to outside of itself are the keys and values that patches before it left
in this step, and those after it in the previous step:

    K/V of patch j, as patch m sees them at step t  =  those of step t if j <= m, else those of step t-1

and those of text tokens, and of pictures to go by, which run with patch 0, from step t. So the result depends on the
number of patches and of synchronous first steps alone; never on the number of stages or on timing.

A stand-in for the scheduler makes the pipeline loop over N x M sub-steps, one for each timestep and patch
(``scheduler.py``). Each sub-step runs the transformer's forward on one patch: ``stage.py`` skips the blocks of other
stages (``blocks.py``), and sends the tokens to the next one (``channel.py``).
"""
