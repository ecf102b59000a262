"""Files of token ids: what of them is read and when, in which order, where documents end, and what is refused."""

import resource
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from core.model import tokens
from core.model.documents import Documents, use_documents
from core.model.gpt import GPT, GPTConfig, materialize, use_masks
from core.model.seeded import SampleMasks
from core.model.text import Text
from core.model.tokenizer import Tokenizer
from core.model.tokens import Tokens, documents_of, shuffled

CPU = torch.device("cpu")


def npy(path: Path, ids: object, kind: str = "uint16") -> str:
    np.save(path, np.asarray(ids, dtype=kind))
    return str(path)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int32", "uint32", "int64", ">u2"])
def test_windows_and_their_targets(tmp_path: Path, kind: str) -> None:
    """Of 0, 1, 2, … each sample is a window from a multiple of S on; in a pass over the file each comes once."""
    data = Tokens(npy(tmp_path / "ids.npy", range(100), kind), 9, 100)
    seen: list[int] = []
    for step in range(11):  # of 3 samples: three passes over 11 windows
        inputs, targets = data.batch(5, step, 3)
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs - inputs[:, :1], torch.arange(9).expand(3, 9))
        seen += inputs[:, 0].tolist()
    passes = [seen[:11], seen[11:22], seen[22:]]
    assert all(sorted(each) == list(range(0, 99, 9)) for each in passes)
    assert passes[0] != passes[1] != passes[2]
    assert data.batch(5, 0, 3)[0].tolist() == data.batch(5, 0, 3)[0].tolist() != data.batch(6, 0, 3)[0].tolist()


def test_bin_is_read_as_npy(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, 300, 200)
    for kind in tokens.TYPES:
        ids.astype(kind).tofile(tmp_path / "ids.bin")
        a = Tokens(str(tmp_path / "ids.bin"), 7, 300, kind)
        b = Tokens(npy(tmp_path / "ids.npy", ids, kind), 7, 300)
        assert all(torch.equal(x, y) for x, y in zip(a.batch(0, 2, 4), b.batch(0, 2, 4), strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 17, 64, 1000])
def test_an_order_has_each_once(count: int) -> None:
    assert sorted(shuffled(i, count, "a") for i in range(count)) == list(range(count))
    if count > 3:
        assert [shuffled(i, count, "a") for i in range(count)] != [shuffled(i, count, "b") for i in range(count)]


def test_the_validation_is_the_end_of_the_file(tmp_path: Path) -> None:
    training, rest = Tokens(npy(tmp_path / "ids.npy", range(200)), 9, 200).split(0.1)
    assert max(training.batch(0, step, 5)[1].max().item() for step in range(9)) < 180
    assert rest.batch(0, 0, 2)[0].min() >= 180


def test_a_large_file_is_not_read_whole(tmp_path: Path) -> None:
    """200 GB, sparse: more than any memory, and a batch of its last windows too."""
    path = tmp_path / "ids.bin"
    with path.open("wb") as file:
        file.truncate(200 * 10**9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = Tokens(str(path), 1024, 10, "uint16")
    data.scan()
    assert data.split(0.1)[0].batch(0, 0, 64)[0].shape == (64, 1024)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_only_this_ranks_rows_are_read(tmp_path: Path) -> None:
    data, rows = Tokens(npy(tmp_path / "ids.npy", range(1, 1001)), 9, 1001), []
    right = Tokens._check
    with patch.object(Tokens, "_check", lambda self, ids, start: rows.append(start) or right(self, ids, start)):
        inputs, _ = data.batch(0, 0, 8, range(2, 4))
    assert len(rows) == 2
    assert not inputs[[0, 1, 4, 5, 6, 7]].any()
    assert torch.equal(inputs[2:4], data.batch(0, 0, 8)[0][2:4])


REFUSED = {
    "missing": ("none.npy", None, None, "No such file"),
    "missing bin": ("none.bin", None, "uint16", "No such file"),
    "name": ("ids.txt", b"x", None, "neither .npy nor .bin"),
    "no numpy file": ("ids.npy", b"hello", None, "is no .npy file"),
    "type needed": ("ids.bin", b"abcd" * 9, None, "use --token-type uint16 or uint32"),
    "size": ("ids.bin", b"abc" * 9, "uint32", "27 bytes are no uint32 ids of 4 each; use a file of 24"),
    "empty": ("ids.bin", b"", "uint16", "0 bytes are no uint16 ids"),
    "two dimensions": ("ids.npy", np.zeros((4, 9), "uint16"), None, "has 2 dimensions, (4, 9); use one, of 36"),
    "floats": ("ids.npy", np.zeros(36), None, "holds float64, not integers"),
    "type of an npy": ("ids.npy", np.zeros(36, "uint16"), "uint16", "says its own; leave it out"),
    "short": (
        "ids.npy",
        np.zeros(8, "uint16"),
        None,
        "8 ids are too few: a sample of --sequence 8 and its target need 9",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path: Path, case: str) -> None:
    name, content, kind, message = REFUSED[case]
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(ValueError) as refused:
        Tokens(str(path), 8, 100, kind)
    assert message in str(refused.value)
    assert "use " in str(refused.value) or "leave" in str(refused.value)


@pytest.mark.parametrize(("kind", "bad"), [("uint16", 100), ("uint32", 70_000), ("int64", -1)])
def test_an_id_outside_the_vocabulary_is_refused_with_its_position(tmp_path: Path, kind: str, bad: int) -> None:
    """At the start in a file that is scanned, else when it is read; also in the held-out part."""
    ids = np.arange(90).astype(kind)
    for at in (0, 31, 81):
        ids[:] = np.arange(90)
        ids[at] = bad
        data = Tokens(npy(tmp_path / "ids.npy", ids, kind), 9, 100)
        with pytest.raises(ValueError, match=f"id {bad} at position {at} is outside the vocabulary of 100"):
            data.scan()
        with patch.object(tokens, "SCANNED", 50):
            data.scan()  # too large: not looked at
        part = data.split(0.2)[at > 71]
        with pytest.raises(ValueError, match=f"id {bad} at position {at} "):
            [part.batch(0, step, 1) for step in range(8)]


def packed(eos: int) -> tuple[GPT, Tensor, Documents]:
    config = GPTConfig(sequence=12, hidden=16, layers=2, heads=2, vocabulary=30)
    model = materialize(GPT(config), 0, CPU, torch.float64)
    documents = use_documents(model, Documents(use_masks(model, SampleMasks(0))))
    inputs = torch.tensor([[5, 6, eos, 7, eos, 8, 9, 1, 2, eos, 3, 4], [eos, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, eos]])
    return model, inputs, documents


def test_documents_end_with_eos_and_are_computed_as_if_alone() -> None:
    model, inputs, documents = packed(0)
    ids = documents_of(inputs, 0)
    assert ids.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3], [0, *[1] * 11]]
    documents.seek(ids)
    whole = model(inputs)
    documents.seek(None)
    for row in range(2):
        for document in ids[row].unique():
            here = ids[row] == document
            alone = model(inputs[row, here].unsqueeze(0))
            assert torch.allclose(whole[row, here], alone[0], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(model(inputs), whole)  # which plain concatenation is not


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    fast = pytest.importorskip("tokenizers")
    made = fast.Tokenizer(fast.models.BPE())
    made.pre_tokenizer = fast.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = fast.decoders.ByteLevel()
    trainer = fast.trainers.BpeTrainer(vocab_size=150, special_tokens=["<end>"], show_progress=False)
    made.train_from_iterator(["the cat sat on the mat, and the dog on the cat"] * 3, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return str(path)


def test_a_text_by_a_tokenizer(tokenizer: str, tmp_path: Path) -> None:
    made, text = Tokenizer(tokenizer), "the dog sat on the mat " * 20
    assert made.decode(made.encode(text)) == text
    assert made.vocabulary > max(made.encode(text))
    (tmp_path / "text").write_text(text)
    inputs, targets = Text(str(tmp_path / "text"), 6, made).batch(0, 0, 3)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert all(made.decode(row.tolist()) in text for row in inputs)
    with pytest.raises(ValueError, match=r"tokens is too short.* --sequence \d+"):
        Text(str(tmp_path / "text"), 5000, made)
    (tmp_path / "text").write_bytes(b"\xff" * 200)
    with pytest.raises(ValueError, match="is no text in UTF-8"):
        Text(str(tmp_path / "text"), 6, made)


def test_a_tokenizer_that_cannot_be_had(tokenizer: str, tmp_path: Path) -> None:
    with patch.dict(sys.modules, {"tokenizers": None}), pytest.raises(ValueError, match="use pip install"):
        Tokenizer(tokenizer)
    with pytest.raises(ValueError, match="No such file"):
        Tokenizer(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is no tokenizer.*; use"):
        Tokenizer(str(tmp_path / "bad.json"))
