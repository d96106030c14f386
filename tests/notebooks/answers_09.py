"""Right and wrong answers to each exercise of notebooks/09_family."""

ANSWERS = {
    "seeds_needed": (
        (
            """
def seeds_needed(size, spread):
    return max(3, int((2 * spread / size) ** 2) + 1)
""",
            """
def seeds_needed(size, spread):
    n = 3
    while size <= 2 * spread / n**0.5:
        n += 1
    return n
""",
        ),
        (
            """
def seeds_needed(size, spread):
    return max(3, int(2 * spread / size) + 1)  # the square forgotten
""",
            """
def seeds_needed(size, spread):
    return max(3, int(np.ceil((2 * spread / size) ** 2)))  # not larger, where it is met exactly
""",
            """
def seeds_needed(size, spread):
    return max(3, (2 * spread / size) ** 2 + 1)  # no whole number
""",
            """
def seeds_needed(size, spread):
    return int((2 * spread / size) ** 2) + 1  # fewer than 3
""",
        ),
    ),
    "not_beaten": (
        """
def not_beaten(losses):
    beats = lambda one, other: one[0] < other[0] and one[1] < other[1]
    return {name for name, own in losses.items() if not any(beats(other, own) for other in losses.values())}
""",
        (
            """
def not_beaten(losses):
    beats = lambda one, other: one[0] < other[0] or one[1] < other[1]  # better in one is not enough
    return {name for name, own in losses.items() if not any(beats(other, own) for other in losses.values())}
""",
            """
def not_beaten(losses):
    return {min(losses, key=lambda name: losses[name][i]) for i in (0, 1)}  # the best in one alone
""",
        ),
    ),
    "forgetting_at": (
        """
def forgetting_at(b, a, target):
    end = int(np.argmin(b)) + 1
    return float(np.interp(target, b[:end][::-1], a[:end][::-1]))
""",
        (
            """
def forgetting_at(b, a, target):
    return float(np.interp(target, b, a))  # np.interp wants a rising b
""",
            """
def forgetting_at(b, a, target):
    return float(np.interp(target, b[::-1], a[::-1]))  # all rates
""",
            """
def forgetting_at(b, a, target):
    b, a = zip(*sorted(zip(b, a)))  # all rates, by their loss
    return float(np.interp(target, b, a))
""",
            """
def forgetting_at(b, a, target):
    end = int(np.argmin(b))  # without the lowest
    return float(np.interp(target, b[:end][::-1], a[:end][::-1]))
""",
        ),
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
