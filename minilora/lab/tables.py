"""Tables for a terminal and for a page. The first column is aligned to the left, all others to the right."""


def table(head, rows) -> str:
    """``head`` and ``rows``, lists of texts, in columns."""
    return "\n".join("  ".join(cells).rstrip() for cells in padded(head, rows))


def markdown(head, rows) -> str:
    """The same as a table of Markdown, whose columns are aligned in a terminal as well."""
    first, *others = padded(head, rows)
    rule = [("-" * (len(cell) + 1) + ":") if i else "-" * (len(cell) + 2) for i, cell in enumerate(first)]
    lines = [f"| {' | '.join(cells)} |" for cells in (first, *others)]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def padded(head, rows) -> list[list[str]]:
    """All rows, the head first, with cells as wide as their columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        for row in (head, *rows)
    ]
