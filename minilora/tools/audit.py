"""``minilora ledger``: the ledger of one step as a table, beside what the allocator says."""

from collections import defaultdict

from ..memory import ledger


def by_operation(entries) -> dict[str, int]:
    """Bytes by operation name, the largest first."""
    totals = defaultdict(int)
    for entry in entries:
        totals[entry.operation] += entry.nbytes
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def audit(model, ids, targets) -> dict:
    """The ledger of one forward pass beside what the allocator says: entries, their total, and the growth in bytes.

    The growth is tracemalloc's, of NumPy's arrays alone, from before the pass to after it, with only the loss alive.
    """
    import tracemalloc

    from numpy.lib import tracemalloc_domain

    def traced():
        arrays = tracemalloc.DomainFilter(inclusive=True, domain=tracemalloc_domain)
        return sum(s.size for s in tracemalloc.take_snapshot().filter_traces([arrays]).traces)

    model.loss(ids, targets)  # what is allocated once and for all is allocated now
    tracemalloc.start()
    try:
        before = traced()
        loss = model.loss(ids, targets)
        entries, grown = ledger(loss, model), traced() - before
    finally:
        tracemalloc.stop()
    return {"entries": entries, "total": sum(e.nbytes for e in entries), "allocator": grown}


def show(name: str, audited: dict) -> str:
    """An audited ledger as a table: equal entries of several layers in one line, those kept before left out."""
    groups = defaultdict(list)
    for e in audited["entries"]:
        if e.nbytes:
            groups[e.operation, e.name, e.shape].append(e.nbytes)
    lines = [f"{name}", f"  {'operation':<20}{'name':<10}{'shape':<18}{'times':>6}{'KiB':>12}"]
    for (operation, array, shape), sizes in sorted(groups.items(), key=lambda item: -sum(item[1])):
        shape = " × ".join(map(str, shape))
        lines.append(f"  {operation:<20}{array:<10}{shape:<18}{len(sizes):>6}{sum(sizes) / 1024:>12,.1f}")
    total, grown = audited["total"], audited["allocator"]
    lines.append(f"  {'total':<54}{total / 1024:>12,.1f}")
    lines.append(f"  {'the allocator says':<54}{grown / 1024:>12,.1f}   ({100 * (grown / total - 1):+.2f} %)")
    return "\n".join(lines)
