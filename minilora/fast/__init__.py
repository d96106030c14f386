"""The same, sooner: faster forms of the book's operations, which register themselves and may be deleted."""
