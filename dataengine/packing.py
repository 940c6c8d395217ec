"""Which labelers share a process, and how many such processes there are: pure functions of measured numbers.

Labelers in one process share the decoded image, and take turns on its device. A group of labelers asks Ray for a share
of CPUs and GPUs; the groups get workers in such numbers that all of them go through images about equally fast, because
the slowest one decides when the run ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dataengine.groups import Cost, Group, Node, Packed, Packing, names
from dataengine.manifest import Dataset
from dataengine.plan import LabelPlan
from dataengine.schedule import Stage
from dataengine.work import LabelGroup

HEADROOM = 0.9
"""The part of a memory that may be planned for."""
CONTEXT_BYTES = 600 << 20
"""What a process takes of a GPU before it has loaded anything."""
PROCESS_BYTES = 500 << 20
"""What a worker process takes of the machine's memory besides its labelers."""
MAX_SHARE = 4
"""Processes on one GPU, at most."""
WORTH = 1.02
"""More groups than needed decode the images more often: they must be faster by this factor."""


def pack(
    costs: Sequence[Cost],
    nodes: Sequence[Node],
    *,
    pins: Sequence[Group] = (),
    decode_seconds: float = 0.0,
    limit: int | None = None,
) -> Packing:
    """The groups, and workers for each, that label most images a second; `costs` are in dependency order.

    `pins` are kept as they are; `limit` is the most workers there may be, of all groups. ValueError when a pin names a
    labeler twice, when pinned groups wait for one another, or when there is no room for a worker.
    """
    if not costs:
        return Packing(())
    machine = _Machine(tuple(nodes), decode_seconds, limit)
    fixed, free = _pinned(costs, pins)
    made = [m for parts, why in _partitions(free, machine) if (m := _filled(fixed, parts, why, machine)) is not None]
    if not made:
        alone = "on its own, because groups that the recipe fixes lie around it"
        made = [m for m in [_filled(fixed, [(c,) for c in free], alone, machine)] if m is not None]
    best: Packing | None = None
    for one in made:
        # Groups that take turns want their workers stopped and others started: only where nothing else fits.
        if best is None or (one.at_once, one.images_per_second) > (best.at_once, best.images_per_second * WORTH):
            best = one
    if best is None:
        raise ValueError(
            f"the groups that the recipe fixes wait for one another: {', '.join('+'.join(p.labelers) for p in pins)}"
        )
    return best


def stages(
    packing: Packing, plan: LabelPlan, root: str, num_rows: Mapping[int, int] | None = None
) -> tuple[Stage, ...]:
    """The groups with the cells of the plan that are theirs, those with none left out.

    `num_rows` are the images of each shard, where they are known; else they are read from the commit records.
    """
    by_name = dict(zip(names(plan.labelers), plan.labelers, strict=True))
    shards = sorted({task.shard for task in plan.tasks})
    rows = num_rows if num_rows is not None else _num_rows(Dataset(root), shards)
    made = []
    for group in packing.groups:
        labelers = tuple(by_name[name] for name in group.labelers)
        emits = {m for labeler in labelers for m in labeler.emits}
        own = ((t, {m: spec for m, spec in t.specs.items() if m in emits}) for t in plan.tasks)
        batches = {labeler.name: group.batches[name] for name, labeler in zip(group.labelers, labelers, strict=True)}
        stage = Stage(
            name=group.name,
            worker=LabelGroup(root, labelers, batches),
            tasks=tuple(replace(task, specs=specs) for task, specs in own if specs),
            num_rows={shard: rows[shard] for shard in shards},
            window=math.lcm(*batches.values()),
            seconds_per_row=group.seconds,
            num_cpus=group.num_cpus,
            num_gpus=group.num_gpus,
            max_workers=group.max_workers,
            needs=group.needs,
        )
        if stage.tasks:
            made.append(stage)
    there = {stage.name for stage in made}
    return tuple(replace(stage, needs=tuple(n for n in stage.needs if n in there)) for stage in made)


def _num_rows(dataset: Dataset, shards: Sequence[int]) -> dict[int, int]:
    return {shard: len(dataset.keys(shard)) for shard in shards}


_Part = tuple[Cost, ...]
_Wanted = tuple[_Part, str, Group | None]


def _filled(
    fixed: Sequence[tuple[_Part, Group]], parts: Sequence[_Part], reason: str, machine: _Machine
) -> Packing | None:
    """The fixed groups and these ones on the machine; None when they wait for one another."""
    groups: list[_Wanted] = [(part, "the recipe fixes it", pin) for part, pin in fixed]
    ordered = _ordered([*groups, *((part, reason, None) for part in parts)])
    return None if ordered is None else machine.filled(ordered)


def _pinned(costs: Sequence[Cost], pins: Sequence[Group]) -> tuple[list[tuple[_Part, Group]], list[Cost]]:
    """The groups that are fixed, with their pins, and the labelers that are not; pins for others have no meaning."""
    taken: set[str] = set()
    fixed = []
    for pin in pins:
        twice = [name for name in pin.labelers if name in taken]
        if twice or len(set(pin.labelers)) < len(pin.labelers):
            raise ValueError(f"groups: {', '.join(twice or pin.labelers)} is named twice, expected once")
        taken |= set(pin.labelers)
        part = tuple(replace(c, batch=pin.batches.get(c.labeler, c.batch)) for c in costs if c.labeler in pin.labelers)
        if part:
            fixed.append((part, pin))
    return fixed, [c for c in costs if c.labeler not in taken]


def _partitions(free: Sequence[Cost], machine: _Machine) -> Iterator[tuple[list[_Part], str]]:
    """Ways to split the labelers that are not fixed, those with the fewest groups first."""
    gpu = [c for c in free if c.gpu] if machine.gpus else []
    if not free:
        yield [], ""
    elif not gpu:
        yield [tuple(free)], "one group: an image is decoded once"
        # Where the memory of a machine holds fewer workers than it has cores, light labelers can have the rest.
        heavy = sorted(free, key=lambda c: -(c.weights_bytes + c.peak_bytes))
        for count in range(1, len(heavy)) if machine.short_of_memory(tuple(free)) else ():
            first = {c.labeler for c in heavy[:count]}
            parts = [tuple(c for c in free if (c.labeler in first) == side) for side in (True, False)]
            yield parts, "the memory holds fewer workers with every labeler than there are cores"
    else:
        bins = machine.bins(gpu)
        why = machine.reason(bins)
        cpu = [c for c in free if c not in gpu]
        before = _makers(free, {m for c in gpu for m in c.inputs})
        independent = [c for c in cpu if not _makers(free, set(c.inputs)) & {g.labeler for g in gpu}]
        for apart in ([], independent, [c for c in cpu if c.labeler not in before], cpu):
            riding = [c for c in cpu if c not in apart]
            parts = _joined(bins, riding, free)
            yield [*parts, tuple(apart)] if apart else parts, why
        # A cut of the dependency order into pieces never makes two groups wait for one another.
        yield machine.pieces(free), why


def _makers(costs: Sequence[Cost], modalities: set[str]) -> set[str]:
    """The labelers that these modalities come from, directly or not."""
    wanted, found = set(modalities), set()
    for c in reversed(costs):
        if set(c.emits) & wanted:
            found.add(c.labeler)
            wanted |= set(c.inputs)
    return found


def _joined(bins: Sequence[_Part], riding: Sequence[Cost], order: Sequence[Cost]) -> list[_Part]:
    """The bins with each CPU labeler in the last one that makes an input of it, or in the fastest one."""
    out = [list(b) for b in bins]
    for c in riding:
        makers = [i for i, b in enumerate(out) if any(set(other.emits) & set(c.inputs) for other in b)]
        users = [i for i, b in enumerate(out) if any(set(other.inputs) & set(c.emits) for other in b)]
        fastest = min(range(len(out)), key=lambda i: sum(other.seconds for other in out[i]))
        out[max(makers) if makers else min(users) if users else fastest].append(c)
    position = {c.labeler: i for i, c in enumerate(order)}
    return [tuple(sorted(b, key=lambda c: position[c.labeler])) for b in out]


def needs(parts: Sequence[_Part]) -> list[set[int]]:
    """For each group, the other groups that make an input of it."""
    maker = {m: i for i, part in enumerate(parts) for c in part for m in c.emits}
    return [{maker[m] for c in part for m in c.inputs if maker.get(m, i) != i} for i, part in enumerate(parts)]


def _ordered(groups: Sequence[_Wanted]) -> list[tuple[_Wanted, set[int]]] | None:
    """The groups, each after those it needs (as positions in the result); None when they wait for one another."""
    waits = needs([part for part, _, _ in groups])
    order: list[int] = []
    while len(order) < len(groups):
        ready = [i for i in range(len(groups)) if i not in order and waits[i] <= set(order)]
        if not ready:
            return None
        order.append(ready[0])
    return [(groups[i], {order.index(j) for j in waits[i]}) for i in order]


@dataclass(frozen=True)
class _Machine:
    """The nodes to fill, and what every group pays for decoding."""

    nodes: tuple[Node, ...]
    decode_seconds: float
    limit: int | None

    @property
    def gpus(self) -> float:
        return sum(n.gpus for n in self.nodes)

    @property
    def gpu_bytes(self) -> int:
        """What a process may plan for on the smallest GPU; 0 when it is not known."""
        smallest = min((n.gpu_bytes for n in self.nodes if n.gpus), default=0)
        return int(smallest * HEADROOM) - CONTEXT_BYTES if smallest else 0

    def short_of_memory(self, part: _Part) -> bool:
        """Whether a node's memory holds fewer workers of this group than it has cores."""
        return any(n.memory_bytes and _host_bytes(part) * n.cpus > HEADROOM * n.memory_bytes for n in self.nodes)

    def bins(self, gpu: Sequence[Cost]) -> list[_Part]:
        """As few groups as the memory of a GPU needs: first fit, the largest first."""
        position = {c.labeler: i for i, c in enumerate(gpu)}
        out: list[list[Cost]] = []
        for c in sorted(gpu, key=lambda c: -(c.weights_bytes + c.peak_bytes)):
            home = next((b for b in out if self._holds([*b, c])), None)
            out.append([c]) if home is None else home.append(c)
        return [tuple(sorted(b, key=lambda c: position[c.labeler])) for b in out]

    def pieces(self, costs: Sequence[Cost]) -> list[_Part]:
        """The labelers in their order, cut where the memory of a GPU is full."""
        out: list[list[Cost]] = [[]]
        for c in costs:
            if out[-1] and not self._holds([*out[-1], c]):
                out.append([])
            out[-1].append(c)
        return [tuple(piece) for piece in out]

    def _holds(self, part: Sequence[Cost]) -> bool:
        return not self.gpu_bytes or _gpu_bytes(part) <= self.gpu_bytes

    def reason(self, bins: Sequence[_Part]) -> str:
        have = f"{(self.gpu_bytes + CONTEXT_BYTES) / 1e9:.1f} GB" if self.gpu_bytes else "what it has"
        if len(bins) == 1:
            return f"its networks fit on one GPU together ({_gpu_bytes(bins[0]) / 1e9:.1f} of {have}): they share it"
        total = sum(_gpu_bytes(b) for b in bins) / 1e9
        return f"the networks need {total:.1f} GB together, a GPU gives {have}: {len(bins)} groups"

    def filled(self, groups: Sequence[tuple[_Wanted, set[int]]]) -> Packing:
        """Workers for the groups: one each, then always one more for the slowest, while there is room."""
        packed: list[Packed] = []
        for (part, reason, pin), waits in groups:
            packed.append(self._packed(part, reason, pin, tuple(packed[i].name for i in sorted(waits))))
        room = _Room(self.nodes, self.limit)
        counts = [0] * len(packed)
        for i in sorted(range(len(packed)), key=lambda i: (-packed[i].num_gpus, -packed[i].num_cpus)):
            if not room.take(packed[i]):
                return self._in_turns(packed)
            counts[i] = 1
        while True:
            slowest = min(range(len(packed)), key=lambda i: counts[i] / packed[i].seconds)
            full = packed[slowest].max_workers is not None and counts[slowest] >= (packed[slowest].max_workers or 0)
            if full or not room.take(packed[slowest]):
                break
            counts[slowest] += 1
        return Packing(tuple(replace(p, workers=n) for p, n in zip(packed, counts, strict=True)))

    def _in_turns(self, packed: Sequence[Packed]) -> Packing:
        """Each group with all the room there is: they cannot be there at the same time."""
        out = []
        for p in packed:
            room, count = _Room(self.nodes, self.limit), 0
            while (p.max_workers is None or count < p.max_workers) and room.take(p):
                count += 1
            if not count:
                have = ", ".join(f"{n.cpus:g} CPUs and {n.gpus:g} GPUs" for n in self.nodes)
                raise ValueError(
                    f"no room for a worker of {p.name}, which asks for {p.num_cpus:g} CPUs and {p.num_gpus:g} GPUs: "
                    f"the nodes have {have or 'nothing'}"
                )
            out.append(replace(p, workers=count, reason=f"{p.reason}; the groups do not fit at once and take turns"))
        return Packing(tuple(out), at_once=False)

    def _packed(self, part: _Part, reason: str, pin: Group | None, waits: tuple[str, ...]) -> Packed:
        on_gpu = any(c.gpu for c in part) and self.gpus > 0 and (pin is None or pin.num_gpus != 0)
        total = sum(c.seconds for c in part)
        # On a GPU the images are decoded beside the networks; on a CPU both want the core.
        seconds = max(total, self.decode_seconds, 1e-6) if on_gpu else max(total + self.decode_seconds, 1e-6)
        num_gpus, num_cpus = 0.0, 1.0
        if on_gpu:
            share = self._share(part)
            num_gpus = math.floor(100 / share) / 100
            need = math.ceil((self.decode_seconds + sum(c.cpu_seconds for c in part)) / seconds)
            there = min(n.cpus / max(n.gpus * share, 1) for n in self.nodes if n.gpus)
            num_cpus = max(min(float(need), math.floor(there)), 1.0) if there >= 1 else math.floor(there * 100) / 100
            if share > 1:
                reason += f"; one alone leaves the GPU idle for half of the time or more: {share} processes on each"
            if not self._holds(part):
                reason += f"; {_gpu_bytes(part) / 1e9:.1f} GB are more than a GPU gives: batches will have to shrink"
        elif _host_bytes(part) > max((_planned(n.memory_bytes) for n in self.nodes), default=math.inf):
            reason += (
                f"; {_host_bytes(part) / 1e9:.1f} GB are more than a node gives: one worker a node, and it may fail"
            )
        if pin is not None:
            # Without GPUs the share of one has no meaning: the same recipe runs on a laptop.
            num_gpus = num_gpus if pin.num_gpus is None or not self.gpus else pin.num_gpus
            num_cpus = num_cpus if pin.num_cpus is None else pin.num_cpus
        guessed = [c.labeler for c in part if not c.measured]
        return Packed(
            labelers=tuple(c.labeler for c in part),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            workers=0,
            seconds=seconds,
            memory_bytes=_gpu_bytes(part) if on_gpu else _host_bytes(part),
            batches={c.labeler: c.batch for c in part},
            needs=waits,
            max_workers=None if pin is None else pin.max_workers,
            reason=reason + (f"; not measured: {', '.join(guessed)}" if guessed else ""),
        )

    def _share(self, part: _Part) -> int:
        """Processes on one GPU: as many as its networks need to keep it busy, if it holds them and cores are there."""
        own = [c for c in part if c.gpu]
        busy = sum(c.seconds * c.busy for c in own) / max(sum(c.seconds for c in own), 1e-9)
        by_memory = self.gpu_bytes // max(_gpu_bytes(part), 1) if self.gpu_bytes else 1
        cores = min(math.floor(n.cpus / n.gpus) for n in self.nodes if n.gpus)
        return max(min(math.floor(1 / max(busy, 0.01)), by_memory, cores, MAX_SHARE), 1)


def _gpu_bytes(part: Sequence[Cost]) -> int:
    """Weights of all, and the largest peak: labelers of one process run one after another."""
    on_gpu = [c for c in part if c.gpu]
    return sum(c.weights_bytes for c in on_gpu) + max((c.peak_bytes for c in on_gpu), default=0)


def _host_bytes(part: Sequence[Cost]) -> int:
    return PROCESS_BYTES + sum(c.weights_bytes for c in part) + max((c.peak_bytes for c in part), default=0)


def _planned(memory_bytes: int) -> float:
    return memory_bytes * HEADROOM if memory_bytes else math.inf


class _Room:
    """What is left of the nodes while workers are placed."""

    def __init__(self, nodes: Sequence[Node], limit: int | None) -> None:
        self._left = [[n.cpus, n.gpus, _planned(n.memory_bytes)] for n in nodes]
        # Resident memory is a rough number: a worker that seems too large for every node may have one to itself.
        self._largest = max((left[2] for left in self._left), default=math.inf)
        self._limit = math.inf if limit is None else limit

    def take(self, group: Packed) -> bool:
        """Room for one more worker, on the fullest node that has it; False when none has."""
        memory = 0 if group.num_gpus else min(group.memory_bytes, self._largest)
        wanted = (group.num_cpus, group.num_gpus, memory)
        fits = [left for left in self._left if all(w <= have + 1e-6 for w, have in zip(wanted, left, strict=True))]
        if self._limit < 1 or not fits:
            return False
        # Workers without a GPU go where the fewest GPUs are left, so that they do not take the cores of one.
        node = min(fits, key=lambda left: (left[1], left[0]))
        for i, w in enumerate(wanted):
            node[i] -= w
        self._limit -= 1
        return True
