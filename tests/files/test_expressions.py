"""The expressions that a file may hold mean what Python's ``re`` means by them, and none of them takes long."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.files.expressions import is_expression, matches_whole

READ = [
    "c_attn",
    "q-proj",
    "h.0.attn",
    r".*\.(q_proj|v_proj)",
    r".*(q|v)_proj$",
    r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    r"model\.layers\.(?:[0-9]|1[0-5])\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)",
    r"^transformer\.h\.(0|1|2|3|4|5|6|7|8|9|10|11)\.(attn|mlp)\.c_(proj|fc|attn)$",
    r".*h\.[0-9]+\.(?:attn|mlp)\..+",
    r"(?:.*\.)?h\.\d{1,2}\.attn\.c_attn",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|(?:model\.layers\.[\d]{1,}\.(?:mlp))",
]
REFUSED = [
    "(a*)*b", "(a+)+$", "(a|b)+", "(a|b){30}", "(?=.*)q", "(?!.*vision).*", r"(.+)\1", "(?i)a", "(?x)( a )", "(?P<a>q)",
    "a**", "a*+", "a{99}", "a{2,1}", "[z-a]", "[a--b]", "[[a]", "(", ")", "[", "*", "\\", r"\s", "(?:" * 5000, "a b",
    "(" * 100 + ")" * 100, "q\n", "é",
]  # fmt: skip


@pytest.mark.parametrize("expression", READ)
def test_what_configurations_contain_is_read(expression):
    assert is_expression(expression)


@pytest.mark.parametrize("expression", REFUSED, ids=lambda text: text[:20])
def test_anything_else_is_not(expression):
    assert not is_expression(expression)


characters = st.sampled_from(["a", "b", "_", ".", r"\.", r"\d", r"\w", "[ab]", "[^.]", "[a-c1]", "1"])
quantifiers = st.sampled_from(["", "", "", "*", "+", "?", "{2}", "{1,}", "{0,2}", "*?", "+?", "{1,2}?"])
pieces = st.one_of(st.tuples(characters, quantifiers).map("".join), st.sampled_from(["^", "$"]))
expressions = st.recursive(
    st.lists(pieces, max_size=4).map("".join),
    lambda inner: st.tuples(
        inner, st.sampled_from(["(", "(?:"]), st.lists(inner, min_size=1, max_size=3).map("|".join),
        st.sampled_from([")", ")?"]), inner,
    ).map("".join),
    max_leaves=6,
)  # fmt: skip


@given(st.lists(expressions, min_size=1, max_size=2).map("|".join), st.text("ab1._", max_size=6))
@settings(max_examples=50, deadline=None)
def test_they_mean_what_they_mean_in_python(expression, name):
    assert is_expression(expression)
    assert matches_whole(expression, name) == bool(re.fullmatch(expression, name))
    starts = [0, *(i + 1 for i, character in enumerate(name) if character == ".")]
    assert matches_whole(expression, name, starts) == bool(re.fullmatch(rf"(.*\.)?({expression})", name))


@pytest.mark.parametrize("expression", [".*" * 499 + "Z", "(|.)" * 249 + "Z", ".?" * 499 + "Z", "(a|a|.)" * 140 + "Z"])
def test_the_dearest_ones_take_no_time(expression):
    """Python's own matcher would not come back from any of them."""
    assert is_expression(expression)
    start = time.process_time()
    assert not matches_whole(expression, "transformer.h.10.attn.c_attn" * 2)
    assert time.process_time() - start < 0.5
