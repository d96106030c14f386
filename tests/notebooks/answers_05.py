"""A right and a wrong answer to each exercise of notebooks/05_lora_plus."""

ANSWERS = {
    "centred_lr_scale": (
        """
def centred_lr_scale(name, ratio):
    return math.sqrt(ratio) if name == "B" else 1.0 / math.sqrt(ratio)
""",
        """
def centred_lr_scale(name, ratio):
    return ratio if name == "B" else 1.0  # LoRA+ itself
""",
    ),
    "equal_alpha": (
        """
def equal_alpha(alpha, ratio, optimizer):
    return alpha * (ratio if optimizer == "adam" else math.sqrt(ratio))
""",
        """
def equal_alpha(alpha, ratio, optimizer):
    return alpha * ratio  # of Adam alone
""",
    ),
    "best_ratios": (
        """
def best_ratios(losses, rates, fixed):
    a, b = np.unravel_index(losses.argmin(), losses.shape)
    return rates[b] / rates[a], rates[losses[fixed].argmin()] / rates[fixed]
""",
        """
def best_ratios(losses, rates, fixed):
    a, b = np.unravel_index(losses.argmin(), losses.shape)
    return rates[b] / rates[a], rates[losses[:, fixed].argmin()] / rates[fixed]  # a column: B's rate held
""",
    ),
    "first_move": (
        """
def first_move(n, lr):
    return lr * n * math.sqrt(2 / math.pi)
""",
        """
def first_move(n, lr):
    return lr * n  # as if |x_j| were 1
""",
    ),
}
