"""The contract of `calibration.load`: lengths, seeds, splits, answers, and every bad input by name."""

import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import sparsesearch
from sparsesearch import calibration
from sparsesearch.errors import ArtifactError, SpecError

MODEL = Path(sparsesearch.__file__).parent / "presets" / "models" / "needle-7m"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def _trained(pre_tokenizer: pre_tokenizers.PreTokenizer, decoder: decoders.Decoder) -> PreTrainedTokenizerBase:
    """A tokenizer that puts BOS in front and merges digits: nothing about needles may rest on one token per digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    corpus = [f"{n} is {n + 7} the code of the red harbor, answer: {3 * n}." for n in range(10_000, 12_000)]
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), "\n", "▁"]
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=900, special_tokens=["<s>"], initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.fixture(scope="module")
def merging_tokenizer() -> PreTrainedTokenizerBase:
    return _trained(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())


@pytest.fixture(scope="module")
def metaspace_tokenizer() -> PreTrainedTokenizerBase:
    """Marks spaces as SentencePiece does: the first digit carries the space before it."""
    pieces = [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Digits(individual_digits=True)]
    return _trained(pre_tokenizers.Sequence(pieces), decoders.Metaspace())


@pytest.mark.parametrize("spec", ["needle", "text"])
@pytest.mark.parametrize("length_tokens", [257, 1024])
def test_every_sequence_has_the_length_asked_for(
    tokenizer: PreTrainedTokenizerBase, spec: str, length_tokens: int
) -> None:
    data = calibration.load(spec, tokenizer, length_tokens=length_tokens, num_samples=7, seed=3)
    assert len(data.samples) == 7
    assert {sample.input_ids.shape for sample in data.samples} == {(length_tokens,)}
    assert (data.num_answers > 0) == (spec == "needle")


def test_same_arguments_same_id_and_another_seed_another_id(tokenizer: PreTrainedTokenizerBase) -> None:
    def identity(seed: int, length_tokens: int = 600) -> str:
        return calibration.load("needle", tokenizer, length_tokens=length_tokens, num_samples=2, seed=seed).id

    assert identity(1) == identity(1)
    assert len({identity(1), identity(2), identity(1, 601)}) == 3


def test_styles_and_wordings_take_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    data = calibration.load("needle", tokenizer, length_tokens=1024, num_samples=6, seed=0)
    assert [sample.template for sample in data.samples] == 2 * list(calibration.TEMPLATES)
    assert [int(sample.answer_mask.sum()) for sample in data.samples] == 3 * [40] + 3 * [20]
    assert [bool(sample.answer_mask[-1]) for sample in data.samples[3:]] == 3 * [True]


def test_several_specs_take_turns(tokenizer: PreTrainedTokenizerBase) -> None:
    both = calibration.load("needle; text", tokenizer, length_tokens=256, num_samples=3, seed=0)
    needles, text = (
        calibration.load(spec, tokenizer, length_tokens=256, num_samples=2, seed=0) for spec in ("needle", "text")
    )
    expected = [needles.samples[0], text.samples[0], needles.samples[1]]
    assert [one.input_ids.tolist() for one in both.samples] == [one.input_ids.tolist() for one in expected]


@pytest.mark.parametrize("template", calibration.TEMPLATES)
@pytest.mark.parametrize("kind", ["tokenizer", "merging_tokenizer", "metaspace_tokenizer"])
def test_the_answer_is_exactly_the_value_that_was_stated(
    request: pytest.FixtureRequest, kind: str, template: str
) -> None:
    """Decoding the marked tokens gives five digits, stated once before with the same key, in the same tokens."""
    tokenizer = request.getfixturevalue(kind)
    data = calibration.needle_questions(tokenizer, length_tokens=1500, num_samples=3, template=template, seed=5)
    for sample in data.samples:
        ids, answer = sample.input_ids, sample.answer_mask
        value = tokenizer.decode(ids[answer])
        assert re.fullmatch(r"\s?\d{5}", value)
        assert answer.nonzero()[-1] == len(ids) - 1
        assert answer.sum() == answer.nonzero()[-1] - answer.nonzero()[0] + 1
        wording = calibration.TEMPLATES[template].question.partition("{v}")[0]
        key = re.escape(wording).replace(r"\{k\}", "(.+?)")
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        found = re.search(key + re.escape(value.strip()) + "$", text)
        assert found is not None
        stated = calibration.TEMPLATES[template].statement.format(k=found[1], v=value.strip())
        assert text.count(stated) == 1
        windows = ids.unfold(0, int(answer.sum()), 1)
        assert (windows == ids[answer]).all(-1).sum() == 2


def test_a_tokenizer_that_glues_the_value_to_the_text_is_refused() -> None:
    tokenizer = _trained(pre_tokenizers.Metaspace(), decoders.Metaspace())  # learns "7." as one token
    with pytest.raises(SpecError, match=r"must keep the value '\d{5}' apart from the text around it, but cut"):
        calibration.load("needle", tokenizer, length_tokens=2000, num_samples=3, seed=0)


def test_digits_are_encoded_as_the_embedded_model_was_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    data = calibration.needle_questions(tokenizer, length_tokens=1024, num_samples=2, template="set_get", seed=5)
    assert [int(sample.answer_mask.sum()) for sample in data.samples] == [5, 5]


def test_depth_places_the_statement(tokenizer: PreTrainedTokenizerBase) -> None:
    for depth in (0.0, 0.5, 1.0):
        (sample,) = calibration.needle_questions(
            tokenizer, length_tokens=2048, num_samples=1, template="set_get", depth=depth, num_needles=4, seed=1
        ).samples
        value = sample.input_ids[sample.answer_mask]
        first = (sample.input_ids.unfold(0, 5, 1) == value).all(-1).nonzero()[0].item()
        assert sample.depth == depth
        assert first / 2048 == pytest.approx(depth, abs=0.03)


def test_start_token_is_kept_where_the_model_expects_one(
    tokenizer: PreTrainedTokenizerBase, merging_tokenizer: PreTrainedTokenizerBase
) -> None:
    for spec in ("needle", "text"):
        data = calibration.load(spec, merging_tokenizer, length_tokens=700, num_samples=6, seed=0)
        assert [int(sample.input_ids[0]) for sample in data.samples] == 6 * [0]
        assert all(int((sample.input_ids == 0).sum()) == 1 for sample in data.samples)


def test_drawn_depths_cover_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    data = calibration.needle_questions(
        tokenizer, length_tokens=512, num_samples=10, template="set_get", num_needles=1, seed=4
    )
    depths = sorted(sample.depth or 0.0 for sample in data.samples)
    assert [int(depth / 0.095) for depth in depths] == list(range(10))


def test_splits_share_no_window(tokenizer: PreTrainedTokenizerBase) -> None:
    def windows(split: calibration.Split) -> set[tuple[int, ...]]:
        data = calibration.load("text", tokenizer, length_tokens=2048, num_samples=30, seed=0, split=split)
        return {tuple(row) for sample in data.samples for row in sample.input_ids.unfold(0, 256, 64).tolist()}

    shared = windows("calibration") & windows("heldout")
    boilerplate = max(1, len(windows("heldout")) // 20)  # pages of one manual repeat navigation text
    assert len(shared) <= boilerplate


def _rows(path: Path, texts: list[str]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(texts), encoding="utf-8")
    else:
        pyarrow = pytest.importorskip(
            "pyarrow", reason="the parquet test needs pyarrow: pip install 'sparsesearch[data]'"
        )
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": texts}), path)
    return path


TEXTS = [" ".join(f"document{number} word{word}" for word in range(200)) for number in range(8)]


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet"])
def test_local_files_split_disjointly(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, suffix: str) -> None:
    spec = str(_rows(tmp_path / f"data{suffix}", TEXTS))
    seen = {}
    for split in ("calibration", "heldout"):
        data = calibration.load(spec, tokenizer, length_tokens=400, num_samples=20, seed=0, split=split)
        text = " ".join(tokenizer.decode(sample.input_ids) for sample in data.samples)
        seen[split] = {int(number) for number in re.findall(r"document(\d) ", text)}
    assert seen["calibration"]
    assert seen["heldout"]
    assert not seen["calibration"] & seen["heldout"]


def test_needles_in_a_file_of_ones_own(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    spec = f"needle:{_rows(tmp_path / 'own.jsonl', TEXTS)}"
    data = calibration.load(spec, tokenizer, length_tokens=1000, num_samples=1, seed=0)
    assert data.num_answers == 40
    assert "document" in tokenizer.decode(data.samples[0].input_ids)


def _bad(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("empty.jsonl", b"", ArtifactError, "must hold text, but is empty"),
        ("blank.txt", b" \n\n", ArtifactError, "must hold text, but is empty"),
        ("latin.txt", "caf\xe9".encode("latin-1"), ArtifactError, "must be UTF-8 text, but byte 3 is not"),
        ("latin.jsonl", '{"text": "caf\xe9"}'.encode("latin-1"), ArtifactError, "must be UTF-8"),
        ("torn.jsonl", b'{"text": "a"}\n{"text": ', ArtifactError, "line 2 must be a JSON object"),
        ("other.jsonl", b'{"txt": "a"}\n', SpecError, "line 1 must hold text in 'text'.*Did you mean 'txt'"),
        ("list.jsonl", b"[1]\n", SpecError, "line 1 must hold text"),
        ("short.txt", b"a few words only", SpecError, r"must hold at least 512 tokens .* holds \d+"),
        ("empty.parquet", b"", ArtifactError, "must be a Parquet file, but is empty or damaged"),
    ],
)
def test_bad_files_are_refused_by_name(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, content: bytes, error: type[Exception], message: str
) -> None:
    spec = str(_bad(tmp_path / name, content))
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(error, match=message) as caught:
        calibration.load(spec, tokenizer, length_tokens=512, num_samples=1, seed=0)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["no.jsonl", "no.txt", "no.parquet"])
def test_a_missing_file_is_named(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match=f"{name} must exist"):
        calibration.load(str(tmp_path / name), tokenizer, length_tokens=64, num_samples=1, seed=0)


@pytest.mark.parametrize("spec", ["needel", "wikitext", "data.csv", ""])
def test_an_unknown_spec_lists_the_known_ones(tokenizer: PreTrainedTokenizerBase, spec: str) -> None:
    with pytest.raises(SpecError, match=r"name:config:split.*Known: needle, .*tasks:NAMES:FORMAT, text"):
        calibration.load(spec, tokenizer, length_tokens=64, num_samples=1, seed=0)


def test_a_missing_extra_says_what_to_install(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _bad(tmp_path / "a.parquet", b"x")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(SpecError, match=r"needs pyarrow.*pip install 'sparsesearch\[data\]'"):
        calibration.load(str(path), tokenizer, length_tokens=64, num_samples=1, seed=0)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(SpecError, match=r"needs datasets.*pip install 'sparsesearch\[data\]'"):
        calibration.load("org/name::train", tokenizer, length_tokens=64, num_samples=1, seed=0)


def test_a_hub_dataset_is_streamed_and_split(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hub:
        calls: list[tuple[str, str | None, str, bool]] = []  # noqa: RUF012

        @classmethod
        def load_dataset(cls, name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
            cls.calls.append((name, config, split, streaming))
            return [{"content": text} for text in TEXTS]

    monkeypatch.setitem(__import__("sys").modules, "datasets", Hub)
    data = calibration.load(
        "org/name::train", tokenizer, length_tokens=300, num_samples=2, seed=0, split="heldout", text_column="content"
    )
    assert Hub.calls == [("org/name", None, "train", True)]
    found = {int(n) for s in data.samples for n in re.findall(r"document(\d) ", tokenizer.decode(s.input_ids))}
    assert found <= {3, 7}


def test_a_sequence_longer_than_the_shipped_text_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(SpecError, match=r"must hold at least 131072 tokens .* holds \d+"):
        calibration.load("text", tokenizer, length_tokens=131_072, num_samples=1, seed=0)


def test_needles_that_do_not_fit_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(SpecError, match=r"at most half of a sequence, but 8 of them take \d+ of 128"):
        calibration.needle_questions(tokenizer, length_tokens=128, num_samples=1, template="set_get", seed=0)
    with pytest.raises(SpecError, match="Did you mean 'set_get'"):
        calibration.needle_questions(tokenizer, length_tokens=128, num_samples=1, template="set_got", seed=0)


def test_samples_check_their_shape() -> None:
    with pytest.raises(SpecError, match="equal length"):
        calibration.Sample(torch.zeros(3, dtype=torch.long), torch.zeros(4, dtype=torch.bool), "here")
    with pytest.raises(SpecError, match="token 0 cannot be an answer"):
        calibration.Sample(torch.zeros(3, dtype=torch.long), torch.tensor([True, False, False]), "here")
    with pytest.raises(SpecError, match="at least one sequence"):
        calibration.Calibration((), "nothing")
