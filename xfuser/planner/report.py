"""Output of ``xdit plan`` for rows with times: the ranking with its reasons, and each number of one row."""

from collections import Counter

from xfuser.planner.cost import BUBBLES, HOST, LINKS, PARTS, with_norms
from xfuser.planner.machines import BETWEEN_NODES, CACHED, EXPS, Machine
from xfuser.planner.table import COLUMNS, Row
from xfuser.planner.trace import ATTENTION, KINDS as KINDS_OF_OPERATORS, MATMUL, MEMORY, Event, Message, Operator

VERBS = {LINKS: "waits for links", BUBBLES: "idles while stages fill and drain", HOST: "waits for the host"}


def ranked(rows: list[Row], objective: str, memory: int | None) -> tuple[list[Row], list[tuple[Row, str]]]:
    """Return the rows that can run, best first, and the others with the reason."""
    out = [(row, row.refusal) for row in rows if row.refusal]
    out += [(row, row.excess(memory)) for row in rows if not row.refusal and not row.fits(memory)]
    fitting = [row for row in rows if not row.refusal and row.fits(memory)]
    return sorted(fitting, key=lambda row: row.value(objective)), out


def why(row: Row, best: Row, objective: str) -> str:
    """The part in which the row loses most against the best one."""
    if row is best:
        return "best"
    if objective == "memory":
        return f"{(row.peak - best.peak) / 1e9:.3g} GB more"
    own, least = ({part: one.time.spent[part] / one.groups for part in PARTS} for one in (row, best))  # per image
    excess = {part: own[part] - least[part] for part in PARTS}
    part = max(excess, key=lambda name: excess[name])
    lost, total = own[part], row.seconds / row.groups
    if excess[part] <= 0.005 * total:
        return "equal, but for rounding"
    return f"{VERBS.get(part, part)}: {lost:.2g} of {total:.3g} s ({name_of(best)}: {least[part]:.2g} s)"


def table(rows: list[Row], objective: str) -> list[str]:
    """The lines of the ranking."""
    width = max(len(name_of(row)) for row in rows)
    heads = [f"{name:>{max(8, len(name))}}" for name in PARTS]
    lines = [f"{'':{width}}   seconds  " + "  ".join(heads) + "      GB  exact  why"]
    for row in rows:
        parts = "  ".join(f"{row.time.spent[name]:{max(8, len(name))}.3g}" for name in PARTS)
        exact = "yes" if row.exact else "no "
        lines.append(
            f"{name_of(row):{width}}  {row.seconds:8.3g}  {parts}  {row.peak / 1e9:6.4g}  {exact}    "
            + why(row, rows[0], objective)
        )
    return lines


def left_out(rest: list[tuple[Row, str]]) -> list[str]:
    """A line for each reason, with the configurations that it excludes."""
    names: dict[str, list[str]] = {}
    for row, reason in rest:
        names.setdefault(reason, []).append(name_of(row))
    return [f"no: {reason}: {', '.join(ones)}" for reason, ones in names.items()]


def name_of(row: Row) -> str:
    """The name of a row in the table."""
    return f"{row.groups} groups of {row.name}" if row.groups > 1 else row.name


def explain(row: Row, machine: Machine, steps: int, compiled: bool) -> list[str]:
    """Explain each number of a row: the counts of a step, the machine figures that divide them, and the memory."""
    known, time, told = machine.constants, row.time, row.told
    last = max(step for step, _ in told.steps)
    events = [event for (step, _), found in told.steps.items() if step == last for event in found]
    flops, scores, moved, count = _totals(events, machine.norms)
    host = machine.host_seconds(compiled)
    lines = [
        f"{row.name} on {machine.name}, {steps} steps, {'compiled' if compiled else 'eager'}",
        f"  machine: {machine.peak / 1e12:.4g} TFLOP/s, of which matrix products reach {machine.reached:.0%}"
        f" ({machine.power:.4g} W, {known.matmul / 1e12:.3g} TFLOP a joule at the full clock of {machine.units}"
        f" processors, {machine.clock / 1e9:.3g} GHz); convolutions are {known.convolution:.2g} times as fast",
        f"           attention: the peak times {machine.kernels:.2g} (of its kernels), and"
        f" {known.attention:.3g} exponentials a score, {EXPS} a cycle and processor",
        f"           memory {machine.bandwidth / 1e9:.4g} GB/s, {known.memory:.0%} of it reached, behind a cache of"
        f" {machine.cache / 1e6:.3g} MB, {CACHED} bytes a cycle and processor",
        f"           host {host * 1e6:.3g} us an operator, device {machine.kernel * 1e6:.3g} us beside its work;"
        f" link {machine.link / 1e9:.4g} GB/s one way,"
        f" {known.link:.0%} of it reached, {known.start * 1e6:.3g} us until a message begins;"
        f" between nodes {machine.node_link / 1e9:.4g} GB/s of a node of {machine.node},"
        f" {known.start * BETWEEN_NODES * 1e6:.3g} us; {known.call:.3g} s of the host for a call beside its operators",
        f"  counted in a step: {flops[MATMUL] / 1e12:.4g} TFLOP of matrix products, {flops[ATTENTION] / 1e12:.4g} TFLOP"
        f" and {scores[ATTENTION] / 1e9:.4g} G scores of attention, {scores[MEMORY] / 1e9:.4g} G exponentials of"
        f" activations, {moved / 1e9:.4g} GB touched by operators as they are,"
        f" {count} operators",
    ]
    for (operation, ranks), (number, sent) in _messages(events).items():
        where = "in a node" if len({rank // machine.node for rank in ranks}) == 1 else "between nodes"
        lines.append(f"           {number} x {operation} over {len(ranks)} ranks {where}: {sent / 1e6:.4g} MB sent")
    lines.append(
        f"  a step: {time.step:.4g} s, the longest chain over device, host and links"
        f" (messages alone would take {time.link:.4g} s)"
    )
    lines.append(f"  {steps} steps: {time.denoise:.4g} s. Seconds of the call:")
    lines += [f"           {name:16} {time.spent[name]:.4g}" for name in PARTS if time.spent[name]]
    lines.append(f"           {'sum':16} {time.seconds:.4g}")
    lines.append("  GB: " + ", ".join(f"{name} {row.needs[name] / 1e9:.4g}" for name in COLUMNS))
    return lines


def _totals(events: list[Event], norms: bool) -> tuple[Counter, Counter, float, int]:
    flops, scores, moved, count = Counter(), Counter(), 0.0, 0
    for event in with_norms(events) if norms else events:
        if isinstance(event, Operator):
            flops[event.kind] += event.flops
            scores[event.kind] += event.scores
            moved, count = moved + event.bytes, count + 1
        elif type(event) is tuple:
            more = _totals(event[0], norms)
            for kind in KINDS_OF_OPERATORS:
                flops[kind] += event[1] * more[0][kind]
                scores[kind] += event[1] * more[1][kind]
            moved, count = moved + event[1] * more[2], count + event[1] * more[3]
    return flops, scores, moved, count


def _messages(events: list[Event]) -> dict[tuple[str, tuple[int, ...]], tuple[int, int]]:
    """Number and bytes of messages by operation and group."""
    found: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}
    for event in events:
        if isinstance(event, Message) and event.operation != "recv":
            more = {(event.operation, event.ranks): (1, event.sent)}
        else:
            more = _messages(event[0]) if type(event) is tuple else {}
        times = event[1] if type(event) is tuple else 1
        for key, (number, sent) in more.items():
            before = found.get(key, (0, 0))
            found[key] = before[0] + number * times, before[1] + sent * times
    return found
