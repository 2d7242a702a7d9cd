"""Where a call stands: which step, and which patch of it."""


class Clock:
    """Counts the sub-steps of one call. A *step* is one entry of the scheduler's timesteps, with M sub-steps.

    Args:
        patches: M.
        warmup: synchronous first steps, in inference steps; the first one is synchronous in any case.
        every_step_whole: whether every rank needs whole latents after each step.
    """

    def __init__(self, patches: int, warmup: int, every_step_whole: bool) -> None:
        self.patches = patches
        self.step = self.patch = 0
        self._warmup, self._every_step_whole = warmup, every_step_whole
        self.steps = 0
        self._synchronous = 1

    def announce(self, steps: int, order: int) -> None:
        """To be called when a schedule is made; ``order`` of its entries make one inference step."""
        if self._warmup * order >= steps + order:
            raise ValueError(
                f"warmup_steps={self._warmup} is more than the {-(-steps // order)} steps of this call: use at most"
                " as many"
            )
        self._synchronous = max(1, self._warmup * order)
        self.begin(steps)

    def begin(self, steps: int) -> None:
        """To be called ahead of the first of that many steps."""
        self.step = self.patch = 0
        self.steps = steps

    @property
    def synchronous(self) -> bool:
        """Whether this step computes the whole image, in its first sub-step."""
        return self.step < self._synchronous

    @property
    def ends_step(self) -> bool:
        """Whether this is the last sub-step of its step."""
        return self.patch == self.patches - 1

    def ends_whole(self, step: int) -> bool:
        """Whether every rank has the whole latents at the end of this step; if not, its patches travel singly."""
        return step < self._synchronous or self._every_step_whole or step >= self.steps - 1

    @property
    def whole(self) -> bool:
        """Whether every rank has the whole latents now, between two sub-steps."""
        return self.patch == 0 and (self.step == 0 or self.ends_whole(self.step - 1))

    def after(self, step: int, patch: int) -> tuple[int, int] | None:
        """The sub-step behind this one, if it follows without a pause: patch by patch, each as soon as it is there."""
        if patch < self.patches - 1:
            return None if step < self._synchronous else (step, patch + 1)
        return None if self.ends_whole(step) else (step + 1, 0)

    def advance(self) -> None:
        self.patch += 1
        if self.patch == self.patches:
            self.step, self.patch = self.step + 1, 0
