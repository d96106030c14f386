"""PEFT's adapter_config.json: which keys are read, which values they may have, and which modules it targets."""

import math
import re

from ..errors import AdapterFormatError, nearest, shown, shown_json
from .tensorfile import parse_json

CONFIG_BYTES, PATTERNS, PATTERN_LENGTH = 1 << 20, 1000, 1000  # caps on a configuration


PATTERN_WAYS = 1 << 22  # and on what its expressions cost: four of .* with four alternatives


def endings(module: str) -> list[str]:
    """``h.0.attn``: attn, 0.attn, h.0.attn."""
    parts = module.split(".")
    return [".".join(parts[-k:]) for k in range(1, len(parts) + 1)]


some_text = lambda value: isinstance(value, str)


texts = lambda value: some_text(value) or (isinstance(value, list) and all(map(some_text, value)))


flag = lambda value: isinstance(value, bool)


whole = lambda value: type(value) is int and 0 <= value < 2**31


rank = lambda value: whole(value) and value > 0


positive = lambda value: type(value) in (int, float) and 0 < value < 1e30


none_or = lambda test: lambda value: value is None or test(value)


map_of = lambda test: lambda value: isinstance(value, dict) and all(map(test, value.values()))


REQUIRED = object()


LISTED = "text or a list of texts"


BOTH_KEYS = {  # a key that is read: (its value where it is missing, what it must be, in words, and as a test)
    "r": (REQUIRED, "an integer of at least 1", rank),
    "target_modules": (REQUIRED, LISTED, texts),
    "layers_to_transform": (
        None,
        "null, an integer, or a list of them",
        none_or(lambda value: whole(value) or (isinstance(value, list) and all(map(whole, value)))),
    ),
    "layers_pattern": (None, f"null, {LISTED}", none_or(texts)),
    "bias": ("none", '"none": no adapter here trains a bias', lambda value: value == "none"),
}


KEYS = {
    "LORA": BOTH_KEYS
    | {
        "lora_alpha": (REQUIRED, "a finite number above 0", positive),
        "rank_pattern": ({}, "a map of names to integers of at least 1", none_or(map_of(rank))),
        "alpha_pattern": ({}, "a map of names to finite numbers above 0", none_or(map_of(positive))),
        "exclude_modules": (None, f"null, {LISTED}", none_or(texts)),
        "use_dora": (False, "true or false", flag),
        "use_rslora": (False, "true or false", flag),
        "init_lora_weights": (
            True,
            'true, false, "gaussian", "orthogonal", "eva" or "pissa": others move the base weight, and PEFT makes LoRA '
            "of them by save_pretrained(path_initial_model_for_weight_conversion=…)",
            lambda value: flag(value) or value in ("gaussian", "orthogonal", "eva", "pissa"),
        ),
    },
    "VERA": BOTH_KEYS
    | {
        "d_initial": (0.1, "a finite number above 0", positive),
        "projection_prng_key": (0, "an integer from 0 to 2³¹ − 1", whole),
        "save_projection": (True, "true or false", flag),
    },
}


# Keys whose value changes nothing that is computed here: dropout and starting values count in training alone.
DATA = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "fan_in_fan_out", "inference_mode",
    "init_weights", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type", "vera_dropout",
}  # fmt: skip


# Keys of PEFT that add something which is not here; they must be off.
OFF = {
    "alora_invocation_tokens", "arrow_config", "corda_config", "kasa_config", "layer_replication", "loftq_config",
    "lora_bias", "lora_ga_config", "megatron_config", "modules_to_save", "monteclora_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
}  # fmt: skip


def read_config(path, text: bytes) -> dict:
    """The keys of KEYS, checked, and peft_type. Raises AdapterFormatError, naming the key and its value."""

    def fail(rule):
        raise AdapterFormatError(path, rule)

    found = parse_json(text, path, "configuration", AdapterFormatError)
    if not isinstance(found, dict):
        fail("the configuration is not a map")
    kind = found.get("peft_type")
    if not isinstance(kind, str) or kind not in KEYS:
        fail(f"peft_type is {shown_json(kind)}; supported: {', '.join(KEYS)} (with use_rslora, use_dora, PiSSA)")
    known = KEYS[kind].keys() | DATA | OFF
    for key, value in found.items():
        off = value is None or value is False or value in ({}, [], "")
        if key in OFF and not off:
            fail(f"{key} is {shown_json(value)}, which is not supported; only adapters without it are read")
        if key not in known and not off:  # a newer PEFT adds keys, which are off unless used
            fail(f"unknown key {shown(key)}, with the value {shown_json(value)}{nearest(key, known)}")
    config = {"peft_type": kind}
    for key, (default, what, test) in KEYS[kind].items():
        if key not in found and default is REQUIRED:
            fail(f"lacks {key}{nearest(key, found.keys() - known)}")
        config[key] = found.get(key, default)
        if not test(config[key]):
            fail(f"{key} is {shown_json(config[key])}; it must be {what}")
    check_patterns(config, fail)
    return config


def check_patterns(config, fail) -> None:
    """Hold the expressions of a file to a cost: one can be written that takes longer than the sun will shine."""
    expressions = {key: [config[key]] for key in ("target_modules", "exclude_modules") if some_text(config.get(key))}
    expressions["layers_pattern"] = as_list(config["layers_pattern"])
    expressions |= {key: list(config.get(key) or {}) for key in ("rank_pattern", "alpha_pattern")}
    ways = 0
    for key, patterns in expressions.items():
        if len(patterns) > PATTERNS:
            fail(f"{key} has {len(patterns):,} entries; at most {PATTERNS:,} are read")
        for pattern in patterns:
            ways += ways_to_match(pattern) if len(pattern) <= PATTERN_LENGTH else math.inf
            if ways > PATTERN_WAYS:
                fail(
                    f"{key}: the expression {shown(pattern)} could take forever; at most {PATTERN_LENGTH} characters, "
                    "four of * + {, and none of them behind a group are read"
                )
            try:
                re.compile(layer_expression(pattern) if key == "layers_pattern" else pattern)
            except (re.error, OverflowError, RecursionError) as error:
                fail(f"{key}: {shown(pattern)} is not a regular expression: {error}")


ESCAPE_OR_CLASS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


GROUP = re.compile(r"\((?:\?(?:[:=!]|<[=!]|P<\w+>))?([^()]*)\)(.?)", re.DOTALL)


def ways_to_match(pattern: str) -> float:
    """A bound of the ways in which an expression can match a module's name, up to 32 for each of its * + and {."""
    text, ways = ESCAPE_OR_CLASS.sub("x", pattern), 1
    if re.search(r"\(\?(?![:=!]|<[=!]|P<)", text):  # flags, which change what the rest means
        return math.inf
    while group := GROUP.search(text):
        if group[2] in ("*", "+", "{"):  # one inside another: exponential
            return math.inf
        ways *= 1 + group[1].count("|")
        text = f"{text[: group.start()]}{group[1].replace('|', '')}x{text[group.start(2) :]}"
    text = re.sub(r"([*+?}])[?+]", r"\1", text)  # lazy and possessive
    unbounded = sum(map(text.count, "*+{"))
    return ways * (1 + text.count("|")) * 32 ** min(unbounded, 100) * 2 ** min(text.count("?"), 100)


def layer_expression(pattern: str) -> str:
    """PEFT's expression for the first number behind a part of a path that ``pattern`` matches: the layer's index."""
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def as_list(value) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def is_targeted(config, module: str) -> bool:
    """PEFT's rule for target_modules, exclude_modules and layers_to_transform."""
    named = lambda wanted: (
        re.fullmatch(wanted, module) is not None if some_text(wanted) else not set(endings(module)).isdisjoint(wanted)
    )
    targets, layers = config["target_modules"], config["layers_to_transform"]
    if config.get("exclude_modules") and named(config["exclude_modules"]):
        return False
    if some_text(targets):
        return targets.lower() == "all-linear" or named(targets)
    if layers in (None, []) or module in targets:
        return named(targets)
    patterns = [layer_expression(own) for own in as_list(config["layers_pattern"])] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    match = next((found for pattern in patterns if (found := re.match(pattern, module))), None)
    return named(targets) and match is not None and match["idx"] is not None and int(match["idx"]) in as_list(layers)
