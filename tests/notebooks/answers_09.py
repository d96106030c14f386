"""A right and a wrong answer to each exercise of notebooks/09_family."""

ANSWERS = {
    "seeds_needed": (
        """
def seeds_needed(size, spread):
    return max(3, int((2 * spread / size) ** 2) + 1)
""",
        """
def seeds_needed(size, spread):
    return max(3, int(2 * spread / size) + 1)  # the square forgotten
""",
    ),
    "not_beaten": (
        """
def not_beaten(losses):
    beats = lambda one, other: one[0] < other[0] and one[1] < other[1]
    return {name for name, own in losses.items() if not any(beats(other, own) for other in losses.values())}
""",
        """
def not_beaten(losses):
    beats = lambda one, other: one[0] < other[0] or one[1] < other[1]  # better in one is not enough
    return {name for name, own in losses.items() if not any(beats(other, own) for other in losses.values())}
""",
    ),
    "forgetting_at": (
        """
def forgetting_at(b, a, target):
    end = int(np.argmin(b)) + 1
    return float(np.interp(target, b[:end][::-1], a[:end][::-1]))
""",
        """
def forgetting_at(b, a, target):
    return float(np.interp(target, b, a))  # np.interp wants a rising b
""",
    ),
    "at_least_one": (
        """
def at_least_one(comparisons, confidence=0.95):
    return 1 - confidence**comparisons
""",
        """
def at_least_one(comparisons, confidence=0.95):
    return comparisons * (1 - confidence)  # more than 1 for 21 comparisons
""",
    ),
}
