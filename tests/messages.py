"""Messages between ranks over a device's groups: checked by NCCL's rules, and recorded for ``nccl.replay``."""

import torch
import torch.distributed as dist

CARRIED = {torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64}  # supported dtypes besides floating point


def tensors_in(values):
    """Return the tensors among an operator's arguments and in lists of them; faster than torch's pytree."""
    found = []
    for x in values:
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found += tensors_in(x)
    return found


def mapped(kind, function, value):
    """Apply ``function`` to all objects of this kind in ``value``, which may be a list or tuple."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)([mapped(kind, function, one) for one in value])
    return value


class Handle:
    """Replaces a work handle: the message's memory must not be used before ``wait()``."""

    def __init__(self, messages, event, works):
        self._messages, self._event, self._works = messages, event, works

    def wait(self, *args):
        for work in self._works:
            work.wait()
        self._messages.arrived(self._event)


class Messages:
    """The messages of one rank.

    Args:
        backend: backend of the groups to check.
        kind: class of the tensors on the device; ``inner`` has their values.
        note: function of a list and an event that appends the event to the list.

    Attributes:
        program: the issued operations, in order.
        objects, host: exchanges of objects, and of tensors on the host.
    """

    def __init__(self, backend, kind, note):
        self._backend, self._kind, self.note = backend, kind, note
        self._flying = {}  # by event: memory that a message writes, memory that it reads
        self.restart()
        self._batch = None  # messages that are issued together

    def restart(self):
        """Start a new program, as if no communicator had been used."""
        self.program, self.objects, self.host = [], [], []
        self._met = set()

    def check(self, func, here, written):
        """Refuse an operator that reads (``here``) memory still to arrive, or writes memory still being sent."""
        for arriving, leaving in self._flying.values():
            if any(_overlap(x, y) for x in here for y in arriving):
                raise RuntimeError(f"{func} on what is still to arrive: wait for it")
            if any(_overlap(x, y) for x in written for y in leaving):
                raise RuntimeError(f"{func} writes what is still being sent: wait for it")

    def communicate(self, func, args, kwargs):
        given = {spec.name: value for spec, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        group = dist.ProcessGroup.unbox(given["process_group"])
        kind = func._schema.name.partition("::")[2]
        tensors = tensors_in((*args, *kwargs.values()))
        if dist.get_backend(group) == self._backend:
            for x in tensors:
                self._refuse(kind, x)
            self._issue(kind, group, given, tensors)
        elif any(isinstance(x, self._kind) for x in tensors):
            raise RuntimeError(f"{kind} of a tensor on the device over a group of the host")
        else:
            self.note(self.host, kind)
        args, kwargs = (mapped(self._kind, lambda x: x.inner, list(one)) for one in (args, kwargs.items()))
        result = func(*args, **dict(kwargs))
        # The operator returns the tensors that were passed, and the work handle.
        back = {id(x.inner): x for x in tensors if isinstance(x, self._kind)}
        return mapped(torch.Tensor, lambda x: back.get(id(x), x), result)

    def _refuse(self, kind, x):
        if not isinstance(x, self._kind):
            raise RuntimeError(f"{kind} of a tensor on the CPU over the device's group")
        if not x.is_contiguous():
            raise RuntimeError(f"{kind} of a tensor {tuple(x.shape)} that is not contiguous")
        if not x.is_floating_point() and x.dtype not in CARRIED:
            raise RuntimeError(f"{kind} of a tensor of {x.dtype}")

    def _issue(self, kind, group, given, tensors):
        members = dist.get_process_group_ranks(group)
        if kind == "allgather_" and len({x.shape for x in tensors}) > 1:
            raise RuntimeError(f"all_gather of different shapes: {[tuple(x.shape) for x in tensors]}")
        if kind in ("send", "recv_"):
            peer = members[given["dst" if kind == "send" else "src"]]
            one = ("send" if kind == "send" else "receive", peer, sum(x.numel() for x in tensors))
            if self._batch is not None:
                self._batch.append((one, group.group_name, tuple(members), tensors))
                return
            self._fly([(one, group.group_name, tuple(members), tensors)], joins=True)
            return
        counts = (tuple(given.get("input_split_sizes", ())), tuple(given.get("output_split_sizes", ())))
        count = counts if any(counts) else min(x.numel() for x in tensors) if tensors else 0
        self._meet(group.group_name, tuple(members))
        self.program.append((kind, group.group_name, tuple(members), None, count))
        self.program.append(("wait", len(self.program) - 1))

    def _fly(self, batch, joins=False):
        """Issue messages together. A single message uses a communicator of its two ranks."""
        (_, peer, _), group, members, _ = batch[0]
        if joins:
            members = tuple(sorted((dist.get_rank(), peer)))
            group = f"{group}: {members}"
        self._meet(group, members)
        self._event = len(self.program)
        self.program.append(("messages", group, members, None, [one for one, *_ in batch]))
        arriving = [x for (kind, *_), _, _, tensors in batch for x in tensors if kind == "receive"]
        leaving = [x for (kind, *_), _, _, tensors in batch for x in tensors if kind == "send"]
        self._flying[self._event] = arriving, leaving

    def _meet(self, group, members):
        """At its first operation on a communicator, the host waits until all members have reached theirs."""
        if (group, members) not in self._met:
            self._met.add((group, members))
            self.program.append(("join", group, members, None, 0))

    def arrived(self, event):
        self._flying.pop(event, None)
        self.program.append(("wait", event))

    def settle(self):
        """Clear all messages in flight, as for failed ranks."""
        self._flying.clear()

    def started(self, original, *args, **kwargs):
        """Replace ``isend`` and ``irecv``."""
        work = original(*args, **kwargs)
        return (
            work if self._batch is not None or self._on_host(kwargs.get("group")) else Handle(self, self._event, [work])
        )

    def waited(self, original, *args, **kwargs):
        """Replace ``send`` and ``recv``."""
        result = original(*args, **kwargs)
        if not self._on_host(kwargs.get("group")):
            self.arrived(self._event)
        return result

    def together(self, original, operations):
        """Replace ``batch_isend_irecv``."""
        if self._on_host(operations[0].group):
            return original(operations)
        self._batch = []
        try:
            works = original(operations)
            self._fly(self._batch)
        finally:
            self._batch = None
        return [Handle(self, self._event, works)]

    def counted(self, name, original, *args, **kwargs):
        """Replace collectives of objects."""
        self.note(self.objects, name)
        return original(*args, **kwargs)

    def _on_host(self, group):
        return dist.get_backend(group or dist.group.WORLD) != self._backend


def _overlap(x, y):
    if x.inner.untyped_storage()._cdata != y.inner.untyped_storage()._cdata or not x.numel() or not y.numel():
        return False
    (start, stop), (first, last) = _extent(x.inner), _extent(y.inner)
    return start < last and first < stop


def _extent(x):
    start = x.storage_offset()
    return start, start + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True)) + 1
