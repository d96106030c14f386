"""Right and wrong answers to each exercise of notebooks/10_gpu."""

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
        (
            """
def crossing(layers, tokens, launches, card):
    seconds = launches * card["seconds per launch"]
    return seconds * card["operations per second"] / (48 * tokens * layers)  # of d²
""",
            """
def crossing(layers, tokens, launches, card):
    seconds = launches * layers / 4 * card["seconds per launch"]  # as if they were those of four blocks
    return (seconds * card["operations per second"] / (48 * tokens * layers)) ** 0.5
""",
            """
def crossing(layers, tokens, launches, card):
    seconds = launches * card["seconds per launch"]
    return (seconds * card["operations per second"] / (48 * N * layers)) ** 0.5  # whatever the tokens
""",
        ),
    ),
    "softmax": (
        (
            """
def softmax(x, xp):
    e = xp.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)
""",
            """
def softmax(x, xp):
    e = xp.exp(x - x.max(1, keepdims=True))
    return e * (1 / e.sum(1, keepdims=True))
""",
            """
def softmax(x, xp):
    e = xp.exp(x - x.max(axis=1)[:, None])
    return e / e.sum(axis=1).reshape(-1, 1)
""",
            """
def softmax(x, xp):
    e = xp.exp(-xp.max(x, axis=1, keepdims=True) + x)
    return e * xp.sum(e, axis=-1, keepdims=True) ** -1
""",
            """
def softmax(x, xp):
    e = xp.exp(x.T - x.max(axis=1))
    return (e / e.sum(axis=0)).T
""",
        ),
        (
            """
def softmax(x, xp):
    e = np.exp(x - x.max(axis=1, keepdims=True))  # NumPy's, whatever x is
    return e / e.sum(axis=1, keepdims=True)
""",
            """
def softmax(x, xp):
    e = xp.exp(x - np.max(x, axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)
""",
            """
def softmax(x, xp):
    e = xp.exp(x - x.max())  # of all rows: the small ones underflow
    return e / e.sum(axis=1, keepdims=True)
""",
            """
def softmax(x, xp):
    e = xp.exp(x)
    return e / e.sum()  # of all rows
""",
        ),
    ),
    "mean_loss": (
        (
            """
def mean_loss(losses):
    return float(sum(losses) / len(losses))
""",
            """
def mean_loss(losses):
    return float(sum(losses[1:], losses[0]) * (1 / len(losses)))
""",
            """
def mean_loss(losses):
    return float(sum(losses)) / len(losses)
""",
        ),
        (
            """
def mean_loss(losses):
    return sum(float(loss) for loss in losses) / len(losses)  # waits for each
""",
            """
def mean_loss(losses):
    return sum(losses) / len(losses)  # still on the card
""",
            """
def mean_loss(losses):
    return float(sum(losses))
""",
        ),
    ),
}
