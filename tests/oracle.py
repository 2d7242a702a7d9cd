"""PipeFusion's semantics in one process, by another mechanism than the engine's.

The pipeline's loop and scheduler are untouched. Each call of the transformer becomes M forwards of the *whole* image,
of which forward m gives the rows of patch m. What makes them differ are key and value projections: in forward m, those
of other patches' tokens, and of text for m > 0, are replaced by what was kept of the forward that owned them.
"""

import itertools
from contextlib import ExitStack, contextmanager

from xfuser.models.registry import plan_of


def bands(count, parts):
    """Consecutive ranges that differ in length by one at most, longer ones first."""
    base, extra = divmod(count, parts)
    starts = [i * base + min(i, extra) for i in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(starts)]


class Displaced:
    """The state of one loop: where it is, and the projections kept from earlier forwards."""

    def __init__(self, model, patches, warmup, order):
        self.model, self.patches, self.synchronous = model, patches, max(1, warmup * order)
        self.step = self.call = self.patch = 0
        self.kept = {}

    def forward(self, original, *args, **kwargs):
        latents = args[0] if args else kwargs["hidden_states"]
        self.packed = latents.dim() == 3
        unit = 1 if self.packed else self.model.config.patch_size
        rows = latents.shape[1 if self.packed else 2] // unit
        self.bands = bands(rows, self.patches)
        self.rows = rows
        if self.step < self.synchronous:
            self.patch = None
            output = original(*args, **kwargs)
        else:
            parts = []
            for patch in range(self.patches):
                self.patch = patch
                parts.append(original(*args, **kwargs))
            whole = parts[0][0].clone()
            for band, part in zip(self.bands, parts, strict=True):
                where = slice(band.start * unit, band.stop * unit)
                if self.packed:
                    whole[:, where] = part[0][:, where]
                else:
                    whole[:, :, where] = part[0][:, :, where]
            output = (whole,) if isinstance(parts[0], tuple) else type(parts[0])(sample=whole)
        self.call += 1
        return output

    def project(self, name, text_first, output):
        """Hook on a projection ``[B, tokens, C]``: own rows are kept, the others replaced by kept ones."""
        key = (name, self.call)
        if self.patch is None:
            self.kept[key] = output.clone()
            return output
        kept, text = self.kept[key], 0
        if text_first is None:  # a projection of text alone
            own = slice(None) if self.patch == 0 else slice(0, 0)
        else:
            text = text_first(output)
            width = (output.shape[1] - text) // self.rows
            band = self.bands[self.patch]
            own = slice(text + band.start * width, text + band.stop * width)
            if self.patch == 0 and text:
                kept[:, :text] = output[:, :text]
        kept[:, own] = output[:, own]
        return kept.clone()


@contextmanager
def displaced(pipe, patches, warmup):
    """Within the context, a bare pipeline draws with PipeFusion's semantics."""
    model, order = pipe.transformer, pipe.scheduler.order
    state = Displaced(model, patches, warmup, order)
    original, step = model.forward, pipe.scheduler.step
    plan = plan_of(model)
    text_length = {}

    def count_text(module, args, kwargs):
        text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        text_length[0] = 0 if text is None else text.shape[1]

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(count_text, with_kwargs=True).remove)
        for name, module in model.named_modules():
            kind = name.split(".")[-1]
            parent = ".".join(name.split(".")[:-1])
            if parent.split(".")[-1] not in plan.attention or kind not in ("to_k", "to_v", "add_k_proj", "add_v_proj"):
                continue
            single = parent.startswith("single_")
            first = None if kind.startswith("add") else (lambda x, s=single: text_length[0] if s else 0)
            stack.callback(
                module.register_forward_hook(
                    lambda m, a, out, name=name, first=first: state.project(name, first, out)
                ).remove
            )
        model.forward = lambda *args, **kwargs: state.forward(original, *args, **kwargs)
        stack.callback(lambda: model.__dict__.pop("forward"))

        def counted(*args, **kwargs):
            state.step, state.call = state.step + 1, 0
            return step(*args, **kwargs)

        counted.__wrapped__ = step
        pipe.scheduler.step = counted
        stack.callback(lambda: pipe.scheduler.__dict__.pop("step"))
        yield
