"""What both sides and the parent agree on: sizes, methods, learning rates, how often a thing is timed."""

from shapes import ALPHA

TURNS = {"tiny": (10, 10), "S": (10, 10), "M": (8, 5), "L": (6, 2), "XL": (6, 1)}  # rounds, timed steps in a turn
UNTIMED = {"L": 0, "XL": 0}  # steps before a turn's timed ones, else 1: seconds drown what a first step costs
LR_RATIO = 16.0  # of LoRA+
METHODS = {  # a method of minilora: PEFT's configuration class, its options, the learning rate of the check
    "lora": ("LoraConfig", {"lora_alpha": ALPHA}, 3e-3),
    "full": (None, {}, 3e-3),  # without PEFT: the weights of the same linears trained, everything else frozen
    "lora_fa": ("LoraConfig", {"lora_alpha": ALPHA}, 3e-3),  # lora_A frozen by hand
    "lora_plus": ("LoraConfig", {"lora_alpha": ALPHA}, 3e-4),  # PEFT's create_loraplus_optimizer
    "vera": ("VeraConfig", {}, 3e-2),
    "dora": ("LoraConfig", {"lora_alpha": ALPHA, "use_dora": True}, 3e-3),
    "dora_detached": ("LoraConfig", {"lora_alpha": ALPHA, "use_dora": True}, 3e-3),
    "rslora": ("LoraConfig", {"lora_alpha": ALPHA, "use_rslora": True}, 3e-3),
}
FIRST_STEP_ONLY = {"dora"}  # PEFT holds DoRA's norm constant: one loss, another gradient
CHECKED_STEPS, TOLERANCE = 5, 1e-4  # of losses, in nats per token
# A factor on all learning rates once the losses are checked: hardly anything moves while times are taken.
IDLE_RATE = 1e-3
MICRO_BATCHES = 4
PROMPT, TOKENS = 8, 64  # of generation; fewer tokens where the context is shorter
