"""What the book is examined with: gradient checks, traces, diffs, exercises."""
