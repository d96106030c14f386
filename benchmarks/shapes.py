"""The sizes and the adapters that every benchmark means by a name."""

SIZES = {  # GPTConfig's vocab_size, n_positions (T), n_embd (d), n_layer, n_head; then the batch, in sequences of T
    "tiny": (96, 128, 128, 4, 4, 8),  # the model that comes with minilora, at the batch of `minilora compare`
    "S": (65, 64, 64, 2, 4, 16),
    "M": (65, 128, 128, 4, 4, 16),
    "L": (65, 256, 384, 6, 6, 8),
    "XL": (50257, 128, 768, 12, 12, 4),  # GPT-2's own width, depth and vocabulary
}
TARGETS, R, ALPHA = ["q", "k", "v", "o", "up", "down"], 8, 16  # LoRA on the six linears of each block
