"""Conciseness: the paper's reward, whether the answer is there, and the questions."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from es_lite.data.prompts import Row
from es_lite.errors import UserError
from es_lite.fitness.tasks import conciseness


def brevity(completion: str, answers: object) -> float | None:
    (reward,) = conciseness.brevity(prompts=["?"], completions=[completion], completion_ids=[[1]], answers=[answers])
    return reward


def right(completion: str, answers: object) -> float | None:
    (reward,) = conciseness.right(prompts=["?"], completions=[completion], completion_ids=[[1]], answers=[answers])
    return reward


def file(folder: Path, name: str, content: str) -> str:
    path = folder / name
    path.write_text(content)
    return str(path)


# The rewards


@pytest.mark.parametrize(
    "completion, answers, reward",
    [
        ("Paris", ["Paris"], 0.0),
        ("Rome!", ["Paris"], 0.0),  # length is all that it sees
        ("Paris.", ["Paris"], -1.0),
        (" Paris\n", ["Paris"], -2.0),  # nothing is stripped
        ("It is Paris.", ["Paris"], -7.0),
        ("Pa", ["Paris"], -3.0),
        ("", ["Paris"], -5.0),
        ("Bell", ["Alexander Graham Bell", "Bell"], 0.0),  # the shortest, wherever it stands
        ("Alexander Graham Bell", ["Bell", "Alexander Graham Bell"], -17.0),
        ("Zoë", ["Zoë"], 0.0),  # characters, not bytes
        ("eight", "eight", 0.0),  # a single right answer
    ],
)
def test_brevity_is_the_distance_in_characters_to_the_shortest_right_answer(completion, answers, reward):
    assert brevity(completion, answers) == reward


@pytest.mark.parametrize(
    "completion, answers",
    [
        ("Paris", ["Paris"]),
        ("The capital of France is PARIS.", ["Paris"]),
        ("**Paris**,", ["Paris"]),
        ("_paris_", ["Paris"]),
        ("It is Alexander Graham\nBell's invention.", ["Alexander Graham Bell"]),
        ("Rene Descartes", ["René Descartes"]),
        ("A Bezier curve", ["Bézier"]),
        ("Re\u0301ne\u0301e", ["Réné", "renee"]),
        ("It has 8 legs", ["eight", "8"]),
        ("Forty-two", ["forty two"]),
        ("forty two", ["forty-two"]),
        ("CO₂", ["CO2"]),
        ("Straße", ["STRASSE"]),
        ("About 1,000,000 of them", ["1000000"]),
        ("1000", ["1,000"]),
        ("π is 3.14.", ["3.14"]),
        ("0°C", ["0"]),
        ("Newton’s law", ["Newton"]),
        ("x" * 4000 + " Paris", ["Paris"]),
    ],
)
def test_an_answer_is_found_as_whole_words(completion, answers):
    assert right(completion, answers) == 1.0


@pytest.mark.parametrize(
    "completion, answers",
    [
        ("", ["Paris"]),
        ("Rome", ["Paris"]),
        ("Parisian", ["Paris"]),
        ("comparison", ["Paris"]),
        ("Gold is taupe", ["Au"]),
        ("Graham Alexander Bell", ["Alexander Graham Bell"]),
        ("18 legs, or 80", ["8"]),
        ("3.8", ["8"]),
        ("8.5", ["8"]),
        ("8,000", ["8"]),
        ("1", ["1.0"]),
        ("South of America", ["South America"]),
        ("x" * 5000 + " Paris", ["Paris"]),  # out of sight
    ],
)
def test_an_answer_that_is_not_there_is_not_found(completion, answers):
    assert right(completion, answers) == 0.0


def test_completions_come_in_batches_and_as_messages():
    texts = ["Paris", "It is Paris.", "Rome"]
    answers = [["Paris"], ["Paris"], ["Oslo", "Christiania"]]
    for completions in (texts, [[{"role": "assistant", "content": text}] for text in texts]):
        arguments = {"prompts": ["?"] * 3, "completions": completions, "completion_ids": [[1]] * 3, "answers": answers}
        assert conciseness.brevity(**arguments, trainer_state=None) == [0.0, -7.0, 0.0]
        assert conciseness.right(**arguments, trainer_state=None) == [1.0, 1.0, 0.0]


def test_the_length_is_trained_on_and_right_answers_are_reported():
    assert dict(zip(conciseness.FUNCTIONS, conciseness.WEIGHTS, strict=True)) == {"conciseness": 1.0, "right_answer": 0.0}
    assert conciseness.brevity.wrong == -1000.0


@pytest.mark.parametrize("answers", [None, [], [5], [""], ["…"], {"a": 1}])
@pytest.mark.parametrize("function, name", [(brevity, "conciseness"), (right, "right_answer")])
def test_columns_that_are_no_answers_are_told_not_graded(function, name, answers):
    with pytest.raises(UserError, match=f"^{name}: .*right answer"):
        function("Paris", answers)


HOSTILE = {
    "tower": "9**9**9**9",
    "factorial": "99999!!",
    "parentheses": "(" * 100_000 + "1" + ")" * 100_000,
    "digits": "9" * 1_000_000,
    "thousands": "1,000" * 200_000,
    "points": "1." * 500_000,
    "sum": "1+" * 500_000,
    "spaces": " " * 1_000_000,
    "NUL": "9\0",
    "lone surrogate": "\ud800",
    "characters that decompose": "\ufdfa" * 100_000,
    "accents": "a" + "\u0301\u0323" * 250_000,
    "import": "__import__('os').system('touch X')",
    "tags": "<answer>" * 100_000,
}


@pytest.mark.parametrize("completion", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_completions_are_only_measured(completion, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert brevity(completion, ["Paris"]) == -abs(len(completion) - 5)
        assert right(completion, ["Paris"]) == 0.0
    assert not list(tmp_path.iterdir())


def test_the_module_needs_no_heavy_package():
    code = "import sys, es_lite.fitness.tasks.conciseness; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "set()\n"


# The built-in questions


@pytest.fixture(scope="module")
def builtin() -> tuple[list[Row], list[Row]]:
    train, test = conciseness.rows("", {}, 0)
    assert test is not None
    return train, test


def questions(made: list[Row]) -> list[str]:
    return [message["content"] for row in made for message in row.prompt]


def test_there_are_24_questions_to_train_on_and_24_others(builtin):
    train, test = builtin
    assert (len(train), len(test)) == (24, 24)
    assert len(set(questions(train + test))) == 48
    assert conciseness.rows("", {}, 99) == builtin


def test_a_row_is_a_message_of_the_user_with_the_right_answers(builtin):
    row = builtin[0][0]
    assert row.prompt == [{"role": "user", "content": "What is the chemical symbol of gold?"}]
    assert row.columns == {"answers": ["Au"]}
    assert (row.where, builtin[1][4].where) == ("builtin:conciseness, question train-1", "builtin:conciseness, question test-5")


def test_every_question_is_fair(builtin):
    for row in builtin[0] + builtin[1]:
        (question,) = questions([row])
        answers = row.columns["answers"]
        assert question.endswith("?")
        assert json.loads(json.dumps(row.columns)) == row.columns
        assert right(question, answers) == 0.0, "who repeats the question has not answered it"
        for answer in answers:
            assert right(f"That would be {answer}.", answers) == 1.0
        assert brevity(min(answers, key=len), answers) == 0.0


def test_fewer_questions_are_the_first_ones(builtin):
    train, test = conciseness.rows("", {"train": 2, "test": 8}, 0)
    assert (train, test) == (builtin[0][:2], builtin[1][:8])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"trian": 2}, r'data\.options\.trian: unknown key; did you mean "train"\?'),
        ({"train": 25}, r"data\.options\.train = 25: expected a whole number from 1 to 24"),
        ({"test": 0}, r"data\.options\.test = 0: expected a whole number from 1 to 24"),
        ({"test": "all"}, r"data\.options\.test = 'all': expected a whole number"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        conciseness.rows("", options, 0)


# Questions from files


def test_questions_of_a_file(tmp_path):
    lines = (
        '{"prompt": "Capital of France?", "answers": ["Paris, France", "Paris"], "level": 1}\n\n'
        '{"question": "And of Norway?", "answer": "Oslo"}\n'
    )
    path = file(tmp_path, "a.jsonl", lines)
    made, held_out = conciseness.rows(path, {}, 0)
    assert held_out is None
    assert made == [
        Row([{"role": "user", "content": "Capital of France?"}], {"answers": ["Paris, France", "Paris"]}, f"{path}:1"),
        Row([{"role": "user", "content": "And of Norway?"}], {"answers": ["Oslo"]}, f"{path}:3"),
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "a?"}', r'has no column "answers" or "answer" \(it has: prompt\)'),
        ('{"answers": ["a"]}', r'has no column "prompt" or "question" \(it has: answers\)'),
        ("{}", r"\(it has: none\)"),
        ('{"prompt": " ", "answers": ["a"]}', r'the question is " "; expected text that is not empty'),
        ('{"prompt": ["a?"], "answers": ["a"]}', r'the question is \["a\?"\]; expected text'),
        ('{"prompt": "a\\u0000?", "answers": ["a"]}', r"no NUL character"),
        ('{"prompt": "a?", "answers": []}', r"the right answers are \[\]; expected text, or a list of texts"),
        ('{"prompt": "a?", "answers": null}', r"the right answers are null; expected"),
        ('{"prompt": "a?", "answers": 5}', r"the right answers are 5; expected"),
        ('{"prompt": "a?", "answers": ["a", 5]}', r"a right answer is 5; expected text with a letter or a digit"),
        ('{"prompt": "a?", "answers": ["a", "?"]}', r'a right answer is "\?"; expected text with a letter or a digit'),
        ('["a?", "a"]', "expected an object"),
        ("{", "not JSON"),
    ],
)
def test_a_bad_row_is_told_with_file_and_line(line, message, tmp_path):
    path = file(tmp_path, "bad.jsonl", '{"prompt": "a?", "answer": "a"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=rf"^.*bad\.jsonl:3: .*({message})"):
        conciseness.rows(path, {}, 0)


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match=r"missing\.jsonl.*no such file"):
        conciseness.rows(str(tmp_path / "missing.jsonl"), {}, 0)
    with pytest.raises(UserError, match=r"empty\.jsonl: there is no question in it"):
        conciseness.rows(file(tmp_path, "empty.jsonl", "\n"), {}, 0)
    path = file(tmp_path, "a.jsonl", '{"prompt": "a?", "answer": "a"}')
    with pytest.raises(UserError, match=r"data\.options\.train: questions from a file have no options"):
        conciseness.rows(path, {"train": 5}, 0)
