"""A right and a wrong answer to each exercise of notebooks/01_engine."""

ANSWERS = {
    "division_vjp": (
        """
def division_vjp(dy, a, b):
    return dy / b, -dy * a / (b * b)
""",
        """
def division_vjp(dy, a, b):
    return dy / b, dy * a / (b * b)  # the sign
""",
    ),
    "mean_vjp": (
        """
def mean_vjp(dy, x):
    return (np.broadcast_to(dy / len(x), x.shape),)
""",
        """
def mean_vjp(dy, x):
    return (np.broadcast_to(dy, x.shape),)  # of the sum
""",
    ),
    "rows_vjp": (
        """
def rows_vjp(dy, x, index):
    dx = np.zeros_like(x)
    np.add.at(dx, index, dy)
    return (dx,)
""",
        """
def rows_vjp(dy, x, index):
    dx = np.zeros_like(x)
    dx[index] += dy  # an index that is named twice is added once
    return (dx,)
""",
    ),
    "gradients": (
        """
def gradients(order, dy):
    found = {order[-1]: dy}
    for node in reversed(order):
        if node.vjp is not None:
            for parent, grad in zip(node.parents, node.vjp(found[node]), strict=True):
                found[parent] = found.get(parent, 0.0) + grad
    return found
""",
        """
def gradients(order, dy):
    found = {order[-1]: dy}
    for node in reversed(order):
        if node.vjp is not None:
            found.update(zip(node.parents, node.vjp(found[node]), strict=True))  # assigned, not added
    return found
""",
    ),
}
