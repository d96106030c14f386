"""A right and a wrong answer to each exercise of notebooks/10_gpu."""

ANSWERS = {
    "step_time": (
        """
def step_time(launches, n_bytes, operations, card):
    return max(
        launches * card["seconds per launch"],
        n_bytes / card["bytes per second"],
        operations / card["operations per second"],
    )
""",
        """
def step_time(launches, n_bytes, operations, card):
    return (
        launches * card["seconds per launch"]
        + n_bytes / card["bytes per second"]
        + operations / card["operations per second"]
    )
""",
    ),
    "crossing": (
        """
def crossing(layers, tokens, launches, card):
    seconds = launches * card["seconds per launch"]
    return (seconds * card["operations per second"] / (48 * tokens * layers)) ** 0.5
""",
        """
def crossing(layers, tokens, launches, card):
    seconds = launches * card["seconds per launch"]
    return seconds * card["operations per second"] / (48 * tokens * layers)  # of d²
""",
    ),
    "softmax": (
        """
def softmax(x, xp):
    e = xp.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)
""",
        """
def softmax(x, xp):
    e = np.exp(x - x.max(axis=1, keepdims=True))  # NumPy's, whatever x is
    return e / e.sum(axis=1, keepdims=True)
""",
    ),
    "mean_loss": (
        """
def mean_loss(losses):
    return float(sum(losses) / len(losses))
""",
        """
def mean_loss(losses):
    return sum(float(loss) for loss in losses) / len(losses)  # waits for each
""",
    ),
}
