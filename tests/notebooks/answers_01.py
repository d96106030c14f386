"""Right and wrong answers to each exercise of notebooks/01_engine."""

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
        (
            """
def mean_vjp(dy, x):
    return (np.broadcast_to(dy, x.shape),)  # of the sum
""",
            """
def mean_vjp(dy, x):
    return np.broadcast_to(dy / len(x), x.shape)  # no tuple
""",
        ),
    ),
    "rows_vjp": (
        """
def rows_vjp(dy, x, index):
    dx = np.zeros_like(x)
    np.add.at(dx, index, dy)
    return (dx,)
""",
        (
            """
def rows_vjp(dy, x, index):
    dx = np.zeros_like(x)
    dx[index] += dy  # an index that is named twice is added once
    return (dx,)
""",
            """
def rows_vjp(dy, x, index):
    dx = np.zeros_like(dy)  # of y's shape
    np.add.at(dx, index, dy)
    return (dx,)
""",
            """
def rows_vjp(dy, x, index):
    dx = np.zeros_like(x)
    np.add.at(dx, index, dy)
    return dx  # no tuple
""",
        ),
    ),
    "gradients": (
        (
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
    backward_in(order)  # from a gradient of 1, and every gradient is linear in dy
    return {node: dy * node.grad for node in order}
""",
            """
def gradients(order, dy):
    order[-1].grad = dy
    for node in reversed(order):
        if node.vjp is not None:
            for parent, grad in zip(node.parents, node.vjp(node.grad), strict=True):
                parent.grad = grad if parent.grad is None else parent.grad + grad
    return {node: node.grad for node in order}
""",
        ),
        (
            """
def gradients(order, dy):
    found = {order[-1]: dy}
    for node in reversed(order):
        if node.vjp is not None:
            found.update(zip(node.parents, node.vjp(found[node]), strict=True))  # assigned, not added
    return found
""",
            """
def gradients(order, dy):
    backward_along_paths(order[-1], dy)  # right, and calls a vjp for each path
    return {node: node.grad for node in order}
""",
            """
def gradients(order, dy):
    backward_in(order)  # dy is left out
    return {node: node.grad for node in order}
""",
        ),
    ),
}
