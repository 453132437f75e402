import gzip
import json
import math
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedTokenizerFast, tokenization_utils_base

from secateur.data import (
    INPUT,
    TARGET,
    Data,
    calibration,
    call,
    digest,
    from_iterable,
    holdout,
    windows,
)
from secateur.data.text import bundled_text, load_text
from secateur.errors import SecateurError

WORDS = 1000


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word w<i> is token i; [BOS] goes in front unless special tokens are off."""
    vocabulary = {f"w{i}": i for i in range(WORDS)} | {"[UNK]": WORDS, "[BOS]": WORDS + 1}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    inner.post_processor = TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", WORDS + 1)])  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", bos_token="[BOS]", model_max_length=8)


TOKENIZER = make_tokenizer()


def counting(tokens: int) -> str:
    """A text whose token at place i is i."""
    return " ".join(f"w{i}" for i in range(tokens))


def take(source: Any, tokenizer: Any = TOKENIZER, **changes: Any) -> Data:
    return calibration(source, tokenizer, **{"samples": 2, "length": 4, "seed": 0, **changes})


# Windows

sizes = st.tuples(st.integers(1, 400), st.integers(1, 20), st.integers(1, 20))  # tokens, length, count
seeds = st.one_of(st.none(), st.integers(0, 2**31))


@given(sizes, seeds)
@settings(max_examples=60, deadline=None)
def test_windows_are_whole_disjoint_in_order_and_repeatable(size: tuple[int, int, int], seed: int | None) -> None:
    tokens, length, count = size
    if tokens // length < count:
        with pytest.raises(SecateurError, match=f"{tokens // length} whole windows of {length}; {count} are needed"):
            windows(counting(tokens), TOKENIZER, length, count, seed=seed)
        return
    cut = windows(counting(tokens), TOKENIZER, length, count, seed=seed)
    assert cut.shape == (count, length)
    assert cut.dtype == torch.int64
    starts = cut[:, 0].tolist()
    assert all(start % length == 0 for start in starts)  # token i is i, so a window's first token is its place
    assert starts == sorted(set(starts))
    assert torch.equal(cut, cut[:, :1] + torch.arange(length))
    assert torch.equal(cut, windows(counting(tokens), TOKENIZER, length, count, seed=seed))


@given(sizes)
@settings(max_examples=30, deadline=None)
def test_without_a_seed_the_windows_are_those_of_the_protocol(size: tuple[int, int, int]) -> None:
    tokens, length, count = size
    k = tokens // length
    if k >= count:
        starts = windows(counting(tokens), TOKENIZER, length, count, seed=None)[:, 0].tolist()
        assert starts == [length * math.floor(i * k / count) for i in range(count)]


def test_seeds_take_different_windows_and_every_window_has_its_turn() -> None:
    seen = {int(s) for seed in range(60) for s in windows(counting(100), TOKENIZER, 10, 3, seed=seed)[:, 0]}
    assert seen == set(range(0, 100, 10))


def test_encoding_is_quiet_about_texts_beyond_the_models_length(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", said.append)
    windows(counting(100), make_tokenizer(), 4, 2, seed=0)
    assert said == []


@pytest.mark.parametrize("way_out", ["--samples 2", "--length 5", "more text"])
def test_too_little_text_names_ways_out_that_work(way_out: str) -> None:
    with pytest.raises(SecateurError, match=way_out):
        windows(counting(20), TOKENIZER, 8, 4, seed=0)
    assert windows(counting(20), TOKENIZER, 8, 2, seed=0).shape == (2, 8)
    assert windows(counting(20), TOKENIZER, 5, 4, seed=0).shape == (4, 5)


# Text files


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*rows: Any) -> str:
    return "\n".join(json.dumps(row) for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "field", "text", "note"),
    [
        ("a.txt", "one\ntwo\n", None, "one\ntwo\n", "a.txt"),
        ("a.md", "# é\r\nx\ry", None, "# é\nx\ny", "a.md"),  # newlines as in text mode
        ("README", b"\xef\xbb\xbfhello", None, "hello", "README"),  # byte order mark
        ("a.jsonl", lines({"text": "x"}, {"text": "y"}), None, "x\n\ny", "'text', guessed by its name, 2 documents"),
        ("a.JSONL", lines({"a": "x", "b": "y"}), "b", "y", "'b', 1 documents"),
        ("a.json", lines({"url": "long" * 9, "content": "x"}), None, "x", "'content', guessed by its name"),
        (
            "a.json",
            lines({"url": "u", "story": "once"}, {"url": "u", "story": "more"}),
            None,
            "once\n\nmore",
            "'story'",
        ),
        ("a.jsonl", lines({"content": [1], "prose": "x"}), None, "x", "'prose', guessed: the most text"),
        (
            "a.jsonl",
            lines({"text": "x"}) + "\n\n  \n" + lines({"text": ""}, {"text": "y"}),
            None,
            "x\n\ny",
            "2 documents",
        ),
        ("a.jsonl", '{"text": "a\u2028b\x85c"}\r\n{"text": "d"}\r\n', None, "a\u2028b\x85c\n\nd", "2 documents"),
    ],
)
def test_load_text(tmp_path: Path, name: str, content: str | bytes, field: str | None, text: str, note: str) -> None:
    found, said = load_text(write(tmp_path / name, content), field)
    assert found == text
    assert note in said


LONE = '{"text": "a\\ud800"}'
NEVER = "[Nn]ever unpickle untrusted files.*safetensors or .npz"


@pytest.mark.parametrize(
    ("name", "content", "field", "message"),
    [
        ("a.txt", "", None, "a.txt is empty"),
        ("a.txt", " \n\r\n\t", None, "is empty"),
        ("a.jsonl", "\n\n", None, "is empty"),
        ("a.txt", b"abc\xff\xfe", None, "byte 3 is 0xff .*Save it as UTF-8"),
        ("a.jsonl", b'{"text": "\xe9"}', None, "byte 10 is 0xe9"),
        ("a.txt", "x", "text", "read as plain text and has no field 'text'"),
        ("a.jsonl", lines({"text": "x"}) + "\n{'text': 'y'}", None, "line 2 is not valid JSON.*one object per line"),
        ("a.jsonl", "[" * 100_000, None, "line 1 is not valid JSON"),
        ("a.json", '[{"text": "x"}]', None, "line 1 holds an array; expected an object"),
        ("a.jsonl", '"x"', None, "line 1 holds a string"),
        ("a.jsonl", lines({"a": "x", "b": "y"}), "text", "line 1 has no field 'text'; its fields: 'a', 'b'"),
        ("a.jsonl", lines({"text": "x"}, {"body": "y"}), None, "line 2 has no field 'text'; its fields: 'body'"),
        ("a.jsonl", lines({"text": "x"}, {}), None, "line 2 has no field 'text'; its fields: none"),
        ("a.jsonl", lines({"text": "x"}, {"text": None}), None, "line 2: field 'text' holds null; expected a string"),
        ("a.jsonl", lines({"text": 3}), "text", "line 1: field 'text' holds a number"),
        ("a.jsonl", lines({"n": 3, "ok": True}), None, "no field with a string in it; its fields: 'n', 'ok'"),
        ("a.jsonl", lines({"text": " "}, {"text": ""}), None, "field 'text' is empty in all 2 lines"),
        ("a.jsonl", LONE, None, "line 1: field 'text' holds half a surrogate pair"),
        ("a.txt.gz", gzip.compress(b"x", mtime=0), None, "is compressed; decompress"),
        ("a.txt", gzip.compress(b"x", mtime=0), None, "is compressed; decompress"),
        ("a.pkl", pickle.dumps([1]), None, NEVER),
        ("a.txt", pickle.dumps([1]), None, NEVER),
        ("a.pt", b"PK\x03\x04", None, NEVER),
        ("a.bin", b"anything", None, NEVER),
        ("a.parquet", b"PAR1", None, "JSON Lines"),
        ("a.npy", b"\x93NUMPY", None, "holds tensors, and text is expected"),
    ],
)
def test_load_text_refuses(tmp_path: Path, name: str, content: str | bytes, field: str | None, message: str) -> None:
    with pytest.raises(SecateurError, match=message) as caught:
        load_text(write(tmp_path / name, content), field)
    assert name in str(caught.value)


def test_load_text_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="does not exist"):
        load_text(tmp_path / "missing.txt", None)
    with pytest.raises(SecateurError, match="is a folder; name one file"):
        load_text(tmp_path, None)


# Calibration from text


def test_calibration_from_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", counting(40))
    made = take(path, seed=None)
    assert [batch["input_ids"].tolist() for batch in made.batches] == [[[0, 1, 2, 3]], [[20, 21, 22, 23]]]
    assert made.tokens == 8
    assert made.description == "2 windows of 4 tokens of a.txt, evenly spaced"
    assert made.digest == digest(made.batches)
    assert "seed 7" in take(str(path), seed=7).description


def test_calibration_of_an_encoder_decoder(tmp_path: Path) -> None:
    made = take(write(tmp_path / "a.txt", counting(40)), encoder_decoder=True)
    for batch in made.batches:
        assert set(batch) == {"input_ids", "decoder_input_ids"}
        assert torch.equal(batch["input_ids"], batch["decoder_input_ids"])
    assert made.tokens == 8


def test_calibration_from_the_bundled_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.data.text.files", lambda package: tmp_path)
    with pytest.raises(SecateurError, match=r"own text is missing.*reinstall"):
        bundled_text()
    (tmp_path / "text").mkdir()
    with pytest.raises(SecateurError, match="own text is missing"):
        bundled_text()
    write(tmp_path / "text" / "b.txt", "w4 w5 w6 w7")
    write(tmp_path / "text" / "a.txt", "w0 w1\r\nw2 w3")
    write(tmp_path / "text" / "LICENSE", "not this")
    assert bundled_text()[0] == "w0 w1\nw2 w3\n\nw4 w5 w6 w7"
    assert [batch["input_ids"].tolist() for batch in take(None).batches] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert "ships with secateur" in take(None).description


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": None}, r"no tokenizer, and a.txt is text. Give pre-tokenized tensors"),
        ({"samples": 11, "vocab_size": 3}, "a.txt has 40 tokens, which make 10 whole windows of 4; 11 are needed"),
        ({"length": 30}, "--samples 1 or --length 20"),
        ({"length": 100}, r"less: --length 20\.$"),
        ({"samples": 100}, r"less: --samples 10\.$"),
        ({"samples": 0}, "samples is 0"),
        ({"length": -1}, "length is -1"),
        ({"seed": None, "vocab_size": 22}, "batch 1: input_ids holds token id 22; the model's vocabulary has 22 ids"),
        ({"field": "text"}, "plain text"),
    ],
)
def test_calibration_refuses_text(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        take(write(tmp_path / "a.txt", counting(40)), **changes)


def test_calibration_checks_the_file_before_the_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match="does not exist"):
        take(tmp_path / "missing.txt", tokenizer=None)


@given(st.integers(4, 200), st.integers(1, 6), st.integers(0, 12), st.integers(1, 12), st.none() | st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_holdout_windows_are_whole_and_none_that_calibration_takes(
    tmp_path_factory: pytest.TempPathFactory, tokens: int, length: int, samples: int, count: int, seed: int | None
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "holdout.txt", counting(tokens))
    whole = tokens // length
    held = holdout(path, TOKENIZER, samples=samples, length=length, count=count, seed=seed)
    starts = [int(window[0, 0]) for window in held]
    assert all(torch.equal(window, torch.arange(s, s + length)[None]) for s, window in zip(starts, held, strict=True))
    assert all(start % length == 0 for start in starts)
    assert len(set(starts)) == len(starts)
    if whole >= samples:
        assert len(held) == min(count, whole - samples)
    if whole >= samples > 0:
        taken = take(path, samples=samples, length=length, seed=seed).batches
        assert not {int(batch["input_ids"][0, 0]) for batch in taken} & set(starts)


def test_of_a_long_text_only_the_beginning_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.data.text.LONGEST", 25)
    lines = write(tmp_path / "lines.txt", "one two\nthree four\nfive six seven\n")
    assert load_text(lines, None) == ("one two\nthree four\n", "the first 0 MB of lines.txt")
    words = write(tmp_path / "words.txt", "one two three four five six seven")
    assert load_text(words, None)[0] == "one two three four five "
    rows = write(tmp_path / "rows.jsonl", '{"text": "one"}\n{"text": "two"}\n')
    assert load_text(rows, None)[0] == "one"


# Calibration from saved tensors


def test_saved_tensors_of_every_kind_give_the_same_batches(tmp_path: Path) -> None:
    ids = torch.arange(30).view(6, 5)
    save_file({"input_ids": ids}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", input_ids=ids.numpy())
    np.save(tmp_path / "a.npy", ids.numpy().astype(np.uint16))
    made = [take(tmp_path / name, tokenizer=None, samples=4) for name in ("a.safetensors", "a.npz", "a.npy")]
    assert len({each.digest for each in made}) == 1
    rows = [batch["input_ids"] for batch in made[0].batches]
    assert all(row.shape == (1, 5) and row.dtype == torch.int64 for row in rows)
    starts = [int(row[0, 0]) for row in rows]
    assert starts == sorted(set(starts))
    assert set(starts) <= set(range(0, 30, 5))
    assert made[0].tokens == 20


def test_saved_tensors_stay_together_by_sample(tmp_path: Path) -> None:
    pixels, mask = torch.arange(8.0).view(8, 1).expand(8, 3).contiguous(), torch.arange(8)
    save_file({"pixel_values": pixels, "pixel_mask": mask}, tmp_path / "a.safetensors")
    made = take(tmp_path / "a.safetensors", tokenizer=None, samples=8)
    assert [int(batch["pixel_mask"][0]) for batch in made.batches] == list(range(8))
    assert all((batch["pixel_values"] == batch["pixel_mask"]).all() for batch in made.batches)
    assert made.tokens == 0
    assert made.batches[0]["pixel_values"].dtype == torch.float32


def test_saved_ids_of_an_encoder_decoder(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.ones((2, 3), int))
    assert set(take(tmp_path / "a.npz", None, encoder_decoder=True).batches[0]) == {"input_ids", "decoder_input_ids"}
    np.savez(tmp_path / "b.npz", input_ids=np.ones((2, 3), int), decoder_input_ids=np.zeros((2, 1), int))
    assert take(tmp_path / "b.npz", None, encoder_decoder=True).batches[0]["decoder_input_ids"].tolist() == [[0]]


def npz(**arrays: Any) -> Any:
    return lambda path: np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("name", "save", "changes", "message"),
    [
        ("a.npz", npz(input_ids=np.ones((1, 3), int)), {}, "holds 1 samples; 2 are needed.*--samples 1"),
        ("a.npz", npz(input_ids=np.ones((0, 3), int)), {}, r"holds 0 samples; 2 are needed. Save more\.$"),
        ("a.npz", npz(input_ids=np.ones((2, 3))), {}, r"input_ids is float64 \[2, 3\]; expected integers"),
        ("a.npz", npz(input_ids=np.ones(8, int)), {}, r"input_ids is int64 \[8\].*\[samples, length\]"),
        ("a.npz", npz(a=np.ones((2, 3)), b=np.ones((3, 3))), {}, r"first dimension.*a \[2, 3\], b \[3, 3\]"),
        ("a.npz", npz(a=np.float32(3)), {}, r"first dimension.*a \[\]"),
        ("a.npz", npz(), {}, "holds no tensors"),
        ("a.npz", npz(x=np.array([{}, {}])), {}, NEVER),
        ("a.npz", npz(x=np.array(["a", "b"])), {}, "torch cannot hold these arrays .x <U1"),
        ("a.npz", npz(x=np.array([[1.0], [np.nan]])), {}, "batch 1: x holds NaN or infinity"),
        ("a.npz", npz(input_ids=np.array([[1], [9]])), {"vocab_size": 9}, "token id 9; the model's vocabulary has 9"),
        ("a.npz", npz(input_ids=np.array([[1], [-1]])), {"vocab_size": 9}, "token id -1;"),
        ("a.npz", lambda path: write(path, "PK nonsense"), {}, "not a valid NumPy file|[Nn]ever unpickle"),
        ("a.npz", lambda path: write(path, b"PK\x03\x04 nonsense"), {}, "not a valid NumPy file"),
        ("a.npy", lambda path: write(path, pickle.dumps([1])), {}, NEVER),
        ("a.npy", lambda path: write(path, ""), {}, "not a valid NumPy file"),
        ("a.safetensors", lambda path: write(path, "nonsense"), {}, "not a valid safetensors file"),
        ("a.safetensors", lambda path: None, {}, "does not exist"),
        ("a.npz", lambda path: path.mkdir(), {}, "is a folder"),
    ],
)
def test_calibration_refuses_tensors(tmp_path: Path, name: str, save: Any, changes: Any, message: str) -> None:
    save(tmp_path / name)
    with pytest.raises(SecateurError, match=message):
        take(tmp_path / name, tokenizer=None, **changes)


# Iterables, and calling a model with what they gave


class Recorder(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs


def test_a_generator_is_consumed() -> None:
    made = from_iterable({"x": torch.tensor([float(number)])} for number in (1, 2, 3))
    assert [float(batch["x"]) for batch in made.batches] == [1.0, 2.0, 3.0]
    assert made.tokens == 0
    assert made.description == "3 batches, the first x [1] float32"


def test_a_data_loader_keeps_its_labels_and_call_passes_only_the_input() -> None:
    images, labels = torch.rand(6, 3, 4, 4), torch.arange(6)
    made = from_iterable(DataLoader(TensorDataset(images, labels), batch_size=2))
    assert len(made.batches) == 3
    assert torch.equal(made.batches[1][TARGET], labels[2:4])
    args, kwargs = call(Recorder(), made.batches[1])
    assert torch.equal(args[0], images[2:4])
    assert len(args) == 1
    assert kwargs == {}


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: [x, 3], lambda x: (x, {"boxes": x})])
def test_call_of_positional_inputs(wrap: Any) -> None:
    x = torch.rand(2)
    for batch in (wrap(x), from_iterable([wrap(x)]).batches[0]):
        args, kwargs = call(Recorder(), batch, use_cache=False)
        assert len(args) == 1
        assert torch.equal(args[0], x)
        assert kwargs == {"use_cache": False}
    assert set(from_iterable([wrap(x)]).batches[0]) == {INPUT}


def test_call_of_keyword_inputs() -> None:
    batch = OrderedDict(input_ids=torch.ones(1, 3, dtype=torch.long), labels=torch.zeros(1, 3))
    args, kwargs = call(Recorder(), batch, use_cache=False)
    assert args == ()
    assert set(kwargs) == {"input_ids", "labels", "use_cache"}
    assert from_iterable([batch]).tokens == 3


def test_inputs_are_detached() -> None:
    x = torch.rand(2, requires_grad=True)
    assert not from_iterable([x * 2]).batches[0][INPUT].requires_grad


def test_additive_masks_may_hold_minus_infinity() -> None:
    mask = torch.tensor([0.0, -math.inf])
    assert from_iterable([{"attention_mask": mask}]).batches[0]["attention_mask"][1] == -math.inf
    with pytest.raises(SecateurError, match="batch 0: attention_mask"):
        from_iterable([{"attention_mask": mask * 0}])


ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "yields no batches"),
        (iter(()), "yields no batches"),
        (ONE, "a single Tensor.*Wrap one batch in a list"),
        ({"x": ONE}, "a single dict"),
        ("text", "a single str"),
        (3, "a single int"),
        ([ONE, 3], "batch 1 is a int; expected a mapping of tensors"),
        ([ONE, ()], "batch 1 is a tuple;"),
        ([("a", ONE)], "batch 0 is a tuple of str"),
        ([{}], "batch 0 holds an empty mapping"),
        ([{"x": ONE, "y": [1]}], "batch 0 holds list under 'y'"),
        ([ONE, ONE * math.nan], "batch 1: input holds NaN or infinity"),
        ([(ONE, ONE * math.inf)], "batch 0: target holds NaN or infinity"),
        ([{"x": ONE.bfloat16() * math.inf}], "batch 0: x holds NaN or infinity"),
    ],
)
def test_from_iterable_refuses(batches: Any, message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        from_iterable(batches)


def test_from_iterable_checks_token_ids() -> None:
    batch = {"input_ids": torch.tensor([[1, 9]]), "labels": torch.tensor([[1, -100]])}
    assert from_iterable([batch], vocab_size=10).tokens == 2
    with pytest.raises(SecateurError, match="batch 1: input_ids holds token id 9; the model's vocabulary has 9 ids"):
        from_iterable([{"x": ONE}, batch], vocab_size=9)


def test_call_refuses_what_is_no_batch() -> None:
    with pytest.raises(SecateurError, match="the batch is a str"):
        call(Recorder(), "text")


# The digest

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@st.composite
def batch_lists(draw: st.DrawFn) -> list[dict[str, Tensor]]:
    def tensor() -> Tensor:
        shape = draw(st.lists(st.integers(0, 2), max_size=2))
        values = draw(st.lists(st.integers(0, 1), min_size=math.prod(shape), max_size=math.prod(shape)))
        return torch.tensor(values).to(draw(st.sampled_from(DTYPES))).reshape(shape)

    keys = st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=2, unique=True)
    return [{key: tensor() for key in draw(keys)} for _ in range(draw(st.integers(0, 2)))]


def same(left: list[dict[str, Tensor]], right: list[dict[str, Tensor]]) -> bool:
    """Without hashing: the same keys, dtypes, shapes and values everywhere."""
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(left, right, strict=True)
    )


@given(batch_lists(), batch_lists())
@settings(max_examples=150, deadline=None)
def test_the_digest_differs_if_and_only_if_the_data_does(
    left: list[dict[str, Tensor]], right: list[dict[str, Tensor]]
) -> None:
    assert (digest(left) == digest(right)) == same(left, right)
    assert digest(left) == digest([{key: batch[key].clone() for key in reversed(batch)} for batch in left])


@given(batch_lists(), st.data())
@settings(max_examples=60, deadline=None)
def test_changing_one_value_changes_the_digest(batches: list[dict[str, Tensor]], choice: st.DataObject) -> None:
    places = [(b, key, i) for b, batch in enumerate(batches) for key in batch for i in range(batch[key].numel())]
    if not places:
        return
    before = digest(batches)
    b, key, i = choice.draw(st.sampled_from(places))
    flat = batches[b][key].view(-1)
    flat[i] = 1 - flat[i].int()
    assert digest(batches) != before


def test_the_digest_depends_on_the_order_of_batches_and_not_on_memory_layout() -> None:
    a, b = {"x": torch.tensor([[1, 2], [3, 4]])}, {"x": torch.tensor([[5, 6], [7, 8]])}
    assert digest([a, b]) != digest([b, a])
    assert digest([{"x": a["x"].T}]) == digest([{"x": a["x"].T.contiguous()}]) != digest([a])


def test_the_digest_knows_where_one_batch_ends() -> None:
    a, b = {"a": torch.ones(2)}, {"b": torch.zeros(2)}
    assert digest([a, b]) != digest([a | b])
