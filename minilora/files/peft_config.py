"""PEFT's adapter_config.json: which keys are read, which values they may have, and which modules it targets.

What belongs to one kind of adapter is in the files of the methods, under the names that begin with ``peft_``.
"""

import json
import re
from dataclasses import dataclass, fields

from .. import methods
from ..errors import nearest, shown
from .errors import AdapterFormatError, shown_json
from .expressions import is_expression, matches_whole
from .tensorfile import parse_json

CONFIG_BYTES = 1 << 20  # caps on a configuration, and on the names and expressions in it
PATTERNS, EXPRESSION_LENGTH, EXPRESSION_LENGTHS = 1000, 1000, 10_000
LANGUAGE = (
    rf"an expression has at most {EXPRESSION_LENGTH:,} characters: letters, digits, _ - . \. \d \w and [a-z], perhaps "
    "followed by * + ? or {1,2}; groups such as (a|b), which cannot be repeated; ^ and $"
)
REQUIRED = object()

# Keys that change nothing which is computed here.
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "inference_mode", "peft_type",
    "peft_version", "revision", "runtime_config", "task_type",
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """What the value of a key must be, in ``words`` and as a ``test``; ``default`` is the value of a missing key."""

    words: str
    test: object
    default: object = REQUIRED


def is_text(value) -> bool:
    return isinstance(value, str)


def is_names(value) -> bool:
    return is_text(value) or (isinstance(value, list) and all(map(is_text, value)))


def is_layer_names(value) -> bool:
    return value is None or (is_names(value) and all(re.fullmatch(r"\w{0,100}", name) for name in as_list(value)))


def is_whole(value) -> bool:
    return type(value) is int and 0 <= value < 2**31


def is_positive(value) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30


LISTED = "text or a list of texts"
SELECTION = {  # the keys that say which modules are adapted; every kind has them
    "target_modules": Rule(LISTED, is_names),
    "exclude_modules": Rule(f"null, {LISTED}", lambda value: value is None or is_names(value), None),
    "layers_to_transform": Rule(
        "null, an integer, or a list of them", lambda value: all(map(is_whole, as_list(value))), None
    ),
    "layers_pattern": Rule("null, a name of letters, digits and _, or a list of them", is_layer_names, None),
    "bias": Rule('"none": no adapter here trains a bias', lambda value: value == "none", "none"),
}
RANK = Rule("an integer of at least 1", lambda value: is_whole(value) and value > 0)
OF_TYPE = {  # hyper-parameters, by the type of the field's default
    int: Rule("an integer from 0 to 2³¹ − 1", is_whole),
    float: Rule("a finite number above 0", is_positive),
    bool: Rule("true or false", lambda value: isinstance(value, bool)),
    str: Rule("text", is_text),
}


def kinds() -> dict[str, list[type]]:
    """{peft_type: the methods as which its files are read}."""
    found = {}
    for method in map(methods.get, methods.names()):
        if method.from_peft:
            found.setdefault(method.peft["peft_type"], []).append(method)
    return found


def choices(own: list[type]) -> dict[str, list]:
    """{key: values that it may have} of the methods' keys that are not hyper-parameters; the first is the usual value.

    A flag that one method sets is off for the others, unless their files say something else.
    """
    found = {}
    for method in own:
        for key, values in method.peft_keys.items():
            found[key] = list(values)
    for method in own:
        for key, value in method.peft.items():
            known = found.setdefault(key, [False])
            if not is_one_of(value, known):
                known.append(value)
    del found["peft_type"]
    return found


def is_one_of(value, known) -> bool:
    """``value in known``, where 1 is not true."""
    return any(type(value) is type(good) and value == good for good in known)


def rules(own: list[type]) -> dict[str, Rule]:
    """The keys that are read in a configuration of these methods."""
    found = SELECTION | {key: chosen_from(values) for key, values in choices(own).items()}
    for method in own:
        if method.peft_shared_key:
            found[method.peft_shared_key] = chosen_from([True, False])
        defaults = {field.name: field.default for field in fields(method)}
        for field, key in method.peft_names.items():
            found[key] = RANK if field == "r" else OF_TYPE[type(defaults[field])]
        for field, key in method.peft_patterns.items():
            found[key] = map_of(found[method.peft_names[field]])
    return found


def chosen_from(values) -> Rule:
    *most, last = map(json.dumps, values)
    words = f"{', '.join(most)} or {last}" if most else last
    return Rule(words, lambda value: is_one_of(value, values), values[0])


def map_of(rule: Rule) -> Rule:
    def test(value):
        return value is None or (isinstance(value, dict) and all(map(rule.test, value.values())))

    return Rule(f"a map from names, each value {rule.words}", test, {})


def read_config(path, text: bytes, own: dict[str, list[type]]) -> dict:
    """The keys that are read, checked, and peft_type; ``own``: the kinds() of files that are read.

    Raises AdapterFormatError, naming the key and its value.
    """
    found = parse_json(text, path, "configuration", AdapterFormatError)
    if not isinstance(found, dict):
        raise AdapterFormatError(path, "the configuration is not a map")
    kind = found.get("peft_type")
    if not is_text(kind) or kind not in own:
        raise AdapterFormatError(path, f"peft_type is {shown_json(kind)}; supported: {', '.join(sorted(own))}")
    known = rules(own[kind])
    ignored = IGNORED.union(*(method.peft_ignored for method in own[kind]))
    for key, value in found.items():
        off = value is None or value is False or value in ({}, [], "")
        if key not in known and key not in ignored and not off:  # PEFT writes all keys that it has, most of them off
            hint = nearest(key, known)
            with_value = f"unknown key {shown(key)}, with the value {shown_json(value)}{hint}"
            raise AdapterFormatError(path, f"{with_value}; only files in which it is absent or off are read")
    config = {"peft_type": kind}
    for key, rule in known.items():
        if key not in found and rule.default is REQUIRED:
            raise AdapterFormatError(path, f"lacks {key}{nearest(key, found.keys() - known)}")
        config[key] = found.get(key, rule.default)
        if not rule.test(config[key]):
            raise AdapterFormatError(path, f"{key} is {shown_json(config[key])}; it must be {rule.words}")
    check_expressions(path, config)
    return config


def check_expressions(path, config) -> None:
    """Hold a file's expressions to the language of expressions.py, and to a length."""
    expressions = [(key, config[key]) for key in ("target_modules", "exclude_modules") if is_text(config[key])]
    for key, value in config.items():
        if isinstance(value, dict):
            if len(value) > PATTERNS:
                raise AdapterFormatError(path, f"{key} has {len(value):,} entries; at most {PATTERNS:,} are read")
            expressions += [(key, name) for name in value]
    for key, expression in expressions:
        if len(expression) > EXPRESSION_LENGTH or not is_expression(expression):
            raise AdapterFormatError(path, f"{key}: the expression {shown(expression)} is not read; {LANGUAGE}")
    if sum(len(expression) for _, expression in expressions) > EXPRESSION_LENGTHS:
        raise AdapterFormatError(path, f"has expressions of more than {EXPRESSION_LENGTHS:,} characters in all")


def endings(module: str) -> list[str]:
    """``h.0.attn``: attn, 0.attn, h.0.attn."""
    parts = module.split(".")
    return [".".join(parts[-k:]) for k in range(1, len(parts) + 1)]


def as_list(value) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def is_targeted(config, module: str) -> bool:
    """PEFT's rule for target_modules, exclude_modules and layers_to_transform."""
    targets, layers = config["target_modules"], as_list(config["layers_to_transform"])
    if config["exclude_modules"] and is_named(config["exclude_modules"], module):
        return False
    if is_text(targets) and targets.lower() == "all-linear":
        return True
    if is_text(targets) or not layers or module in targets:
        return is_named(targets, module)
    return is_named(targets, module) and layer_index(config["layers_pattern"], module) in layers


def is_named(wanted, module: str) -> bool:
    """Does the expression match ``module``, or is one of the names it or its ending?"""
    if is_text(wanted):
        return matches_whole(wanted, module)
    return not set(endings(module)).isdisjoint(wanted)


def layer_index(names, module: str) -> int | None:
    """PEFT's index of the layer that ``module`` is in: the first number after one of ``names``, or after any name."""
    patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in as_list(names)] if names else [r".*?\.[^.]*\.(\d+)\."]
    return next((int(found[1]) for pattern in patterns if (found := re.match(pattern, module))), None)


def value_for(pattern, module: str, usual):
    """A module's value in a map {expression: value}: PEFT's rule is that the first that matches an ending counts."""
    starts = [0, *(i + 1 for i, character in enumerate(module) if character == ".")]
    return next((value for text, value in (pattern or {}).items() if matches_whole(text, module, starts)), usual)
