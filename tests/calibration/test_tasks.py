"""Long-context tasks: exact lengths, answers that the text holds, formats, seeds, and refusals by name."""

import re

import pytest
import torch
from test_load import merging_tokenizer, metaspace_tokenizer, tokenizer  # noqa: F401
from transformers import PreTrainedTokenizerBase

from sparsesearch import calibration
from sparsesearch.calibration.tasks import FORMATS, SUITES, TASKS, Format, TaskSample, task_names, task_samples
from sparsesearch.errors import SpecError

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LENGTH = 700


@pytest.fixture
def chatty(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:  # noqa: F811
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def made(tokenizer: PreTrainedTokenizerBase, name: str, count: int = 2, **more: object) -> tuple[TaskSample, ...]:  # noqa: F811
    return task_samples(tokenizer, name, length_tokens=LENGTH, num_samples=count, seed=5, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("form", FORMATS)
def test_length_and_answers(chatty: PreTrainedTokenizerBase, name: str, form: Format) -> None:
    for one in made(chatty, name, format=form, shots=1):
        ids, mask = one.sample.input_ids, one.sample.answer_mask
        assert ids.shape == (LENGTH,)
        assert mask[-1], "the last answer ends the sequence"
        text = chatty.decode(ids)
        for segment in one.segments:
            said = chatty.decode(ids[segment.start : segment.stop])
            assert [value.strip() for value in said.split(",")] == list(segment.answers)
            before = chatty.decode(ids[: one.segments[0].start])
            assert all(value in before for value in segment.answers), "what is asked was said"
        marked = "".join(chatty.decode(ids[place]) for place in mask.nonzero()[:, 0])
        wanted = "".join(value for segment in one.segments for value in segment.answers)
        assert marked.replace(" ", "") == wanted
        assert ("<|assistant|>" in text) == (form == "chat")
        assert ("Answer:" in text) == (form == "sentence" or (form == "completion" and name != "kv_recall"))


@pytest.mark.parametrize("kind", ["merging_tokenizer", "metaspace_tokenizer"])
@pytest.mark.parametrize("name", TASKS)
def test_other_tokenizers(request: pytest.FixtureRequest, kind: str, name: str) -> None:
    """Merged digits and marked spaces change tokens, not values."""
    other = request.getfixturevalue(kind)
    (one,) = task_samples(other, name, length_tokens=1500, num_samples=1, seed=1, format="sentence")
    assert one.sample.input_ids.shape == (1500,)
    said = other.decode(one.sample.input_ids[one.segments[-1].start :])
    assert [value.strip() for value in said.split(",")] == list(one.segments[-1].answers)


def test_what_each_task_asks(tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: F811
    def text_of(name: str) -> tuple[str, TaskSample]:
        one = made(tokenizer, name, 1)[0]
        return tokenizer.decode(one.sample.input_ids), one

    text, one = text_of("multikey")
    assert len(re.findall(r"secret number of the [a-z ]+ is \d{5}", text)) == 8
    text, one = text_of("multivalue")
    key = re.search(r"all the secret numbers of the ([a-z ]+)\?", text)
    assert key is not None
    assert tuple(re.findall(rf"of the {key[1]} is (\d{{5}})", text)) == one.segments[0].answers, "in order of the text"
    text, one = text_of("multiquery")
    assert len(one.segments) == 4
    text, one = text_of("kv_recall")
    pairs = dict(re.findall(r"set ([a-z 0-9]+) = (\d{5})", text))
    asked = re.search(r"get ([a-z 0-9]+) ->", text)
    assert len(pairs) > 20
    assert asked is not None
    assert one.segments[0].answers == (pairs[asked[1]],)
    text, one = text_of("tracking")
    holds = dict(re.findall(r"VAR ([a-z]+) = (V\w+ \w+)", text))
    value = re.search(r"hold the value (\d{5})", text)
    assert value is not None
    followed, source = [], f"VALUE {value[1]}"
    while names := [name for name, held in holds.items() if held == source]:
        followed += names
        source = f"VAR {names[0]}"
    assert tuple(followed) == one.segments[0].answers
    for name, count in (("common_words", 4), ("frequent_words", 3)):
        text, one = text_of(name)
        listed = re.findall(r"[a-z]+(?=,)", text.partition(" Question")[0])
        most = sorted(set(listed), key=listed.count)[-count:]
        assert set(most) == set(one.segments[0].answers)


def test_any_order_is_accepted_once(tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: F811
    one = made(tokenizer, "common_words", 1)[0]
    firsts = [place for place in range(LENGTH) if (one.accepted[place] >= 0).any()]
    assert [int((one.accepted[place] >= 0).sum()) for place in firsts] == [4, 3, 2, 1]
    for place in firsts:
        assert int(one.sample.input_ids[place]) in one.accepted[place].tolist()
    assert (made(tokenizer, "multikey", 1)[0].accepted == -1).all()


def test_seeds_and_splits(tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: F811
    def tokens(**more: object) -> torch.Tensor:
        return made(tokenizer, "multikey", 1, **more)[0].sample.input_ids

    assert torch.equal(tokens(), tokens())
    assert not torch.equal(tokens(), tokens(split="calibration"))
    first, second = made(tokenizer, "multikey", 2)
    assert first.segments[0].answers != second.segments[0].answers


def test_calibration_takes_tasks_in_turn(tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: F811
    data = calibration.load("tasks:needle,kv_recall:sentence", tokenizer, length_tokens=400, num_samples=3, seed=0)
    assert [sample.template for sample in data.samples] == ["needle", "kv_recall", "needle"]
    assert data.num_answers == 15


def test_refusals(tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: F811
    assert task_names("ruler") == tuple(TASKS)
    assert set(task_names("aggregation,needle")) == {*SUITES["aggregation"], "needle"}
    with pytest.raises(SpecError, match="multikey"):
        task_names("multi_key")
    with pytest.raises(SpecError, match="at least one"):
        task_names(" ,")
    with pytest.raises(SpecError, match="too long"):
        task_samples(tokenizer, "multikey", length_tokens=60, num_samples=1, seed=0)
    with pytest.raises(SpecError, match="format"):
        calibration.load("tasks:needle:sentance", tokenizer, length_tokens=400, num_samples=1, seed=0)
    tokenizer.chat_template = None
    with pytest.raises(SpecError, match="chat template"):
        made(tokenizer, "needle", format="chat")
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(SpecError, match="sentence"):
        made(tokenizer, "needle", format="chat")
    tokenizer.chat_template = None
