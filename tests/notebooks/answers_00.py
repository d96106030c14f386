"""A right and a wrong answer to each exercise of notebooks/00_tour."""

ANSWERS = {
    "trained_numbers": (
        """
def trained_numbers(r, shapes):
    return sum(r * (d_out + d_in) for d_out, d_in in shapes)
""",
        """
def trained_numbers(r, shapes):
    return sum(r * d_out * d_in for d_out, d_in in shapes)  # of BA, which is never trained
""",
    ),
    "lora_forward": (
        """
def lora_forward(x, W, A, B, s):
    return x @ W.T + (x @ A.T) @ (s * B).T
""",
        """
def lora_forward(x, W, A, B, s):
    return x @ W.T + (x @ A.T) @ B.T  # s forgotten
""",
    ),
    "merged_weight": (
        """
def merged_weight(W, A, B, s):
    return W + (s * B) @ A
""",
        """
def merged_weight(W, A, B, s):
    W += (s * B) @ A  # in place: it cannot be taken out exactly
    return W
""",
    ),
    "bits_per_character": (
        """
def bits_per_character(nats):
    return nats / math.log(2)
""",
        """
def bits_per_character(nats):
    return nats * math.log(2)
""",
    ),
}
