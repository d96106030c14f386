"""Configurations that lie: seeds for the JSON files beside safetensors in the folders of PEFT and of transformers."""

import json
import math

from hostile import DEEP, FILES, KILLER, LONG, Seed, raw

# -------------------------------------------------------------------------------- the text of any of them

TEXTS = {
    "empty": (b"", "not JSON"),
    "a brace": (b"{", "not JSON"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "not JSON"),
    "UTF-16": ("{}".encode("utf-16"), "not UTF-8"),
    "not UTF-8": (b'{"\xff": 1}', "not UTF-8"),
    "zeros": (bytes(1000), "not JSON"),
    "a pickle": (KILLER, "not JSON"),
    "a zip archive": (b"PK\3\4" + bytes(26), "not JSON|not UTF-8"),
    "an HTML page": (b"<!DOCTYPE html><html></html>", "not JSON"),
    "a git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "not JSON"),
    "YAML": (b"peft_type: LORA\nr: 2\n", "not JSON"),
    "Python": (b"{'peft_type': 'LORA', 'r': __import__('os').system('touch killed')}", "not JSON"),
    "a list": (b"[]", "not a map"),
    "null": (b"null", "not a map"),
    "a number": (b"1", "not a map"),
    "text": (b'"LORA"', "not a map"),
    "NaN": (b"NaN", "holds NaN"),
    "a hundred thousand brackets": (b"[" * DEEP + b"]" * DEEP, "nested too deeply"),
    "a hundred thousand braces": (b'{"r":' * DEEP, "nested too deeply"),
    "a number of 100,000 digits": (b'{"r": ' + b"9" * DEEP + b"}", "too long"),
    "2 MB": (b"{" + b" " * 2_000_000 + b"}", "is larger than"),
}


def text_seeds(key: str) -> dict[str, Seed]:
    """Seeds for any configuration that has ``key``, a number."""
    seeds = {f"text: {name}": Seed(raw(lambda good, text=text: text), rule) for name, (text, rule) in TEXTS.items()}
    seeds["text: a key twice"] = Seed(raw(lambda good: f'{{"{key}": 1, '.encode() + good.lstrip()[1:]), "twice")
    files = {name: seed for name, seed in FILES.items() if "terabyte" not in name}
    files["a sparse file of a terabyte"] = (FILES["a sparse file of a terabyte"][0], "is larger than")
    return seeds | {f"file: {name}": Seed(*seed) for name, seed in files.items()}


def changed(**values):
    """A spoil that changes keys of a JSON file; GONE takes one away."""

    def spoil(path):
        found = json.loads(path.read_bytes()) | values
        path.write_text(json.dumps({key: value for key, value in found.items() if value is not GONE}))

    return spoil


GONE = object()

# -------------------------------------------------------------------------------- adapter_config.json

NO_TEXT = [None, 1, True, [], {}, ["LORA"]]
NO_RANK = [GONE, None, 0, -1, -(10**12), True, "8", 2.0, math.nan, [2], {}, 2**31, 10**12, int(LONG)]
NO_ALPHA = [GONE, None, 0, -1, True, "16", 1e308, 10**300, int(LONG), math.nan, math.inf, -math.inf, [], {}]
NO_FLAG = [None, 1, 0, "true", "", [], {}]
NO_NAMES = [GONE, None, 1, True, {}, [1], [None], [["q"]], {"q": 1}]
WRONG = {
    "peft_type": [GONE, *NO_TEXT, "", "lora", "IA3", "os.system", "../LORA", "\x1b[2J\n", "LORA\0", "L" * 100_000],
    "r": NO_RANK,
    "lora_alpha": NO_ALPHA,
    "target_modules": NO_NAMES,
    "exclude_modules": [1, True, {}, [1]],
    "layers_to_transform": ["0", -1, True, 0.0, [True], ["0"], 2**70, {}],
    "layers_pattern": [1, True, {}, [1]],
    "rank_pattern": [[], "q", 1, True, *({"q": value} for value in NO_RANK if value is not GONE)],
    "alpha_pattern": [[], "q", 1, True, *({"q": value} for value in NO_ALPHA if value is not GONE)],
    "use_dora": NO_FLAG,
    "use_rslora": NO_FLAG,
    "init_lora_weights": [None, 1, [], {}, "", "olora", "loftq", "pissa_niter_16", "os.system", "\x1b[2J"],
    "bias": [None, True, "", "all", "lora_only"],
}
# Each takes a backtracking matcher longer than anyone waits, on some name; and what is no expression at all.
EXPRESSIONS = [
    "(a+)+$", "([a-z.]+)*$", "(.*)*x", "(.|.)*x", "(a|aa)+$", "(x+x+)+y", "((.*)(.*))*x", "(.*.*.*)+x", "(?:.+)+x",
    ".*" * 20 + "x", ".*?" * 20 + "x", ".+" * 12 + "x", "[a-z.]*" * 15 + "!", r"[\w.]{0,20}" * 12 + "!",
    ".?" * 60 + "!",
    "(.?){60}!", "(?=(.+)+x)q", r"(.+)\1+x" * 8, "(" * 200 + ")" * 200 + "*", "(((((.*)*)*)*)*)*x", "(q|k|v|o){60}x",
    "(?:" * 5000, "(", "[", "*", "q)", "(?P<a>q)(?P<a>q)", "(?<q", "(?(1)a|b", "q{99999999999999999999}", "\\", "[z-a]",
    "(?i)(a+)+$", "(?x: ( a + ) + ) $", "q" * 100_000, "a|" * 100_000, "\0" * 2000, "(.*)*" * 200,
    "[a-z]*[0-9]*" * 9 + "!",
]  # fmt: skip


def peft_seeds(off) -> dict[str, Seed]:
    """Seeds for the adapter_config.json of a LoRA; ``off``: keys that must not be active, by name."""
    seeds = {
        f"{key}: {'missing' if value is GONE else repr(value)[:30]}": Seed(changed(**{key: value}), key)
        for key, values in WRONG.items()
        for value in values
    }
    for key, value in [("r", "NaN"), ("lora_alpha", "Infinity")]:
        seeds[f"{key}: {value}"] = Seed(changed(**{key: float(value)}), f"holds {value}")
    seeds = {
        name: Seed(
            seed.spoil, "holds NaN|holds -?Infinity" if name.endswith(("nan", "inf", "nan}", "inf}")) else seed.rule
        )
        for name, seed in seeds.items()
    }
    for i, expression in enumerate(EXPRESSIONS):
        for key in ("target_modules", "exclude_modules", "layers_pattern"):
            values = {key: expression} | ({"layers_to_transform": [0]} if key == "layers_pattern" else {})
            seeds[f"{key}: expression {i}"] = Seed(changed(**values), ".")
        for key in ("rank_pattern", "alpha_pattern"):
            seeds[f"{key}: expression {i}"] = Seed(changed(**{key: {expression: 2}}), ".")
    seeds |= {f"{key}: active": Seed(changed(**{key: {"q": "os.system"}}), key) for key in sorted(off)}
    return seeds | {
        "target_modules: 2,000 names": Seed(changed(target_modules=[f"q{i}" for i in range(2000)]), "."),
        "rank_pattern: 2,000 names": Seed(changed(rank_pattern={f"q{i}": 2 for i in range(2000)}), "rank_pattern"),
        "an unknown key": Seed(changed(run="touch killed"), "unknown key"),
        "a misspelt key": Seed(changed(lora_alpah=16), "unknown key"),
        "a key of control codes": Seed(changed(**{"\x1b[2J\nall is well": 1}), "unknown key"),
        "a very long key": Seed(changed(**{"r" * 100_000: 1}), "unknown key"),
        "a very long value": Seed(changed(modules_to_save=["x" * 1000] * 900), "modules_to_save"),
    }


# -------------------------------------------------------------------------------- the config.json of GPT-2

NO_SIZE = [None, 0, -1, True, "12", 1.0, math.nan, [], {}, 2**31, 10**12, int(LONG)]
SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")


def gpt2_seeds() -> dict[str, Seed]:
    """Seeds for the config.json of a GPT-2 with 2 positions, width 8, 2 heads, one layer and 11 tokens."""
    rule = lambda key, value: "holds NaN" if value is not None and value != value else key
    seeds = {
        f"{key}: {value!r:.30}": Seed(changed(**{key: value}), rule(key, value)) for key in SIZES for value in NO_SIZE
    }
    other = {
        "model_type": [None, "llama", ["gpt2"], 1, "os.system", "\x1b[2J"],
        "activation_function": [None, "relu", "gelu", "__import__('os')", 1, {}],
        "layer_norm_epsilon": [None, 1e-6, 0, "1e-5", True, []],
        "scale_attn_weights": [None, False, 1, "true"],
        "scale_attn_by_inverse_layer_idx": [None, True, 0],
        "tie_word_embeddings": [None, False, 1],
        "add_cross_attention": [None, True, 0],
        "n_inner": [0, 7, "32", True, -32, 2**40],
    }
    return seeds | {
        f"{key}: {value!r:.30}": Seed(changed(**{key: value}), key) for key, values in other.items() for value in values
    }


# Sizes that are possible, and not those of the file: nothing may be allocated for them.
OTHER_SIZES = {
    "vocab_size": [10, 12, 2**30, 2**31 - 1],
    "n_positions": [1, 3, 2**30, 2**31 - 1],
    "n_embd": [4, 16, 2**20, 2**30],
    "n_layer": [2, 1000, 2**30, 2**31 - 1],
}
INDEXES = {
    "a path upwards": {"weight_map": {"wte.weight": "../model.safetensors"}},
    "an absolute path": {"weight_map": {"wte.weight": "/etc/passwd"}},
    "an absolute path to a good name": {"weight_map": {"wte.weight": "/tmp/model.safetensors"}},
    "a folder within": {"weight_map": {"wte.weight": "a/model.safetensors"}},
    "a backslash": {"weight_map": {"wte.weight": "..\\model.safetensors"}},
    "a pickle": {"weight_map": {"wte.weight": "pytorch_model.bin"}},
    "a zero": {"weight_map": {"wte.weight": "model\0.safetensors"}},
    "a line end": {"weight_map": {"wte.weight": "model.safetensors\n"}},
    "control codes": {"weight_map": {"wte.weight": "\x1b[2J.safetensors"}},
    "no text": {"weight_map": {"wte.weight": 1}},
    "null": {"weight_map": {"wte.weight": None}},
    "a list": {"weight_map": {"wte.weight": ["model.safetensors"]}},
    "an empty map": {"weight_map": {}},
    "no map": {},
    "a map that is a list": {"weight_map": ["model.safetensors"]},
    "a map that is text": {"weight_map": "model.safetensors"},
}
