"""Countdown: problems that can be solved, the paper's rewards, and answers that nobody may run."""

import hashlib
import json
import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path

import pytest

from es_lite.data.prompts import Row
from es_lite.errors import UserError
from es_lite.fitness.tasks import countdown

NUMBERS, TARGET = [44, 19, 35], "98"


def answer(completion: str, numbers: list = NUMBERS, target: object = TARGET) -> float | None:
    (reward,) = countdown.answer(
        prompts=["?"], completions=[completion], completion_ids=[[1]], numbers=[numbers], target=[target]
    )
    return reward


def tagged(expression: str) -> str:
    return f"44 and 19 and 35 make 98.</think>\n<answer>{expression}</answer>"


def form(completion: str) -> float | None:
    (reward,) = countdown.form(prompts=["?"], completions=[completion], completion_ids=[[1]], id=[0], numbers=[[1]], target=["1"])
    return reward


def file(folder: Path, name: str, content: str) -> str:
    path = folder / name
    path.write_text(content)
    return str(path)


# The rewards


@pytest.mark.parametrize(
    "expression, numbers, target",
    [
        ("44 + 19 + 35", NUMBERS, "98"),
        (" 44+19+35\n", NUMBERS, "98"),
        ("((44)+(19))+(35)", NUMBERS, 98),
        ("35 - -44 + +19", NUMBERS, 98.0),
        ("-" * 60 + "44 + 19 + 35", NUMBERS, "98"),
        ("44 +" + " " * 900 + "19 + 35", NUMBERS, "98"),
        ("44 - 19 * 35", NUMBERS, "-621"),
        ("(44 - 19) * 35", NUMBERS, "875"),
        ("31 / 2", [2, 31], "15.5"),
        ("800/3", [3, 800], "266.6666666666667"),
        ("800/3", [3, 800], "266.66666"),  # 6.7e-6 away
        ("8 / (3 - 8 / 3)", [3, 3, 8, 8], "24"),
        ("5 - 0", [0, 5], "5"),
        ("+".join(["999999999"] * 32), [999_999_999] * 32, "31999999968"),
    ],
)
def test_right_answers(expression, numbers, target):
    assert answer(tagged(expression), numbers, target) == 1.0


@pytest.mark.parametrize(
    "expression, numbers, target",
    [
        ("44 + 19 - 35", NUMBERS, "98"),  # another value
        ("*".join(["1000000000"] * 32), [10**9] * 32, "1"),  # too large for a float
        ("-" * 150 + "44 + 19 + 35", NUMBERS, "98"),  # deeper, and longer, than anybody writes
        ("44 +" + " " * 1000 + "19 + 35", NUMBERS, "98"),
        ("44 + 54", NUMBERS, "98"),  # a number that was not given
        ("98", NUMBERS, "98"),
        ("44 + 19 + 35 + 44 - 44", NUMBERS, "98"),  # a number twice
        ("44 + 35", NUMBERS, "79"),  # one left out
        ("3 + 3", [3, 3, 3], "6"),
        ("800/3", [3, 800], "266.6666"),  # 6.7e-5 away
        ("44 + 19 + 35 = 98", NUMBERS, "98"),
        ("98 = 44 + 19 + 35", NUMBERS, "98"),
        ("44 + 19 + 35.", NUMBERS, "98"),
        ("44.0 + 19 + 35", NUMBERS, "98"),
        ("44 × 19", [44, 19], "836"),
        ("19 // 3", [19, 3], "6"),
        ("2 ** 3", [2, 3], "8"),
        ("2 ^ 3", [2, 3], "1"),
        ("7 % 4", [7, 4], "3"),
        ("044 + 19 + 35", NUMBERS, "98"),
        ("4_4 + 19 + 35", NUMBERS, "98"),
        ("0x2C + 19 + 35", NUMBERS, "98"),
        ("44 + 19 +\n35", NUMBERS, "98"),  # as in the paper: only spaces between the parts
        ("44 + 19 + 35 # right", NUMBERS, "98"),
        ("44 + 19 + 35,", NUMBERS, "98"),
        ("(44 + 19 + 35", NUMBERS, "98"),
        ("44(19)", [44, 19], "836"),
        ("()", [1], "1"),
        ("1 / 0", [1, 0], "1"),
        ("1 / (2 - 2)", [1, 2, 2], "1"),
        ("", NUMBERS, "98"),
        ("the sum", NUMBERS, "98"),
        (r"\boxed{44+19+35}", NUMBERS, "98"),
    ],
)
def test_wrong_answers(expression, numbers, target):
    assert answer(tagged(expression), numbers, target) == 0.0


@pytest.mark.parametrize(
    "completion, reward",
    [
        ("<answer>1</answer> no: <answer>44+19+35</answer> Done.", 1.0),
        ("<answer>44+19+35</answer> no: <answer>1</answer>", 0.0),
        ("I write it in <answer> </answer> tags: <answer>44+19+35</answer>", 1.0),
        ("I write it in <answer> tags: <answer>44+19+35</answer>", 0.0),  # the first opening tag is the one that is closed
        ("<answer>44+19+35</answer></answer>", 1.0),
        ("<answer>44+19+35</answer> and one more <answer>1", 1.0),
        ("<answer><answer>44+19+35</answer></answer>", 0.0),
        ("<answer>44+19+35", 0.0),
        ("44+19+35</answer>", 0.0),
        ("</answer>44+19+35<answer>", 0.0),
        ("<ANSWER>44+19+35</ANSWER>", 0.0),
        ("44+19+35", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_pair_of_answer_tags_counts(completion, reward):
    assert answer(completion) == reward


@pytest.mark.parametrize(
    "completion, reward",
    [
        ("hm</think>\n<answer>5</answer>", 1.0),
        ("</think>\n<answer></answer>", 1.0),
        ("a\nb</think>\n<answer>\n5\n</answer>\n", 1.0),
        ("<think>again</think>\n<answer>5</answer>", 1.0),
        ("a</think> b</think>\n<answer>5</answer> or <answer>6</answer>", 1.0),
        ("hm</think>\n<answer>5</answer>\n\n", 0.6),
        ("hm</think>\n<answer>5</answer> Done.", 0.6),
        ("hm</think><answer>5</answer>", 0.6),
        ("hm</think>\n\n<answer>5</answer>", 0.6),
        ("hm</think> <answer>5</answer>", 0.6),
        ("<answer>5</answer></think>\n<answer>", 0.6),
        ("</answer></think>\n<answer>", 0.1),
        ("hm</think>\n<answer>5", 0.1),
        ("hm</think> 5", 0.1),
        ("<answer>5</answer>", 0.5),
        ("</answer><answer>", 0.0),
        ("5", 0.0),
        ("", 0.0),
    ],
)
def test_the_reward_for_the_format(completion, reward):
    assert form(completion) == pytest.approx(reward, abs=1e-12)


def test_completions_come_in_batches_and_as_messages():
    texts = [tagged("44+19+35"), tagged("1"), tagged("2*3")]
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {"numbers": [NUMBERS, NUMBERS, [2, 3]], "target": ["98", "98", "6"], "id": [1, 2, 3]}
    for completions in (texts, messages):
        arguments = {"prompts": ["?"] * 3, "completions": completions, "completion_ids": [[1]] * 3, **columns}
        assert countdown.answer(**arguments, trainer_state=None) == [1.0, 0.0, 1.0]
        assert countdown.form(**arguments, trainer_state=None) == [1.0, 1.0, 1.0]


def test_the_whole_reward_is_the_papers():
    assert dict(zip(countdown.FUNCTIONS, countdown.WEIGHTS, strict=True)) == {"countdown_answer": 1.0, "countdown_format": 0.1}


def test_columns_that_are_no_problem_are_told_not_graded():
    with pytest.raises(UserError, match=r'^countdown_answer: "numbers" is "1 2 3"; expected a list of 1 to 32 whole numbers'):
        answer(tagged("1+2+3"), "1 2 3", "6")


# Hostile answers

DEEP = 100_000
MEGABYTE = 1_000_000
HOSTILE = {
    "tower": "9**9**9**9",
    "tower of the problem's numbers": "44**19**35",
    "long tower": "**".join(["9"] * 300),
    "shift": "1<<99999999999",
    "factorial": "99999!!",
    "parentheses": "(" * DEEP + "44+19+35" + ")" * DEEP,
    "parentheses within the limit": "(" * 480 + "44+19+35" + ")" * 480,
    "open parentheses": "(" * 900,
    "signs within the limit": "-" * 980 + "44+19+35",
    "signs": "-" * DEEP + "44+19+35",
    "digits": "9" * MEGABYTE,
    "digits within the limit": "9" * 1000,
    "sum": "1+" * MEGABYTE + "1",
    "sum within the limit": "1+" * 499 + "1",
    "spaces": " " * MEGABYTE + "44+19+35",
    "NUL": "44+19+35\0",
    "only NUL": "\0",
    "lone surrogate": "44+19+\ud80035",
    "other digits": "٤٤+١٩+٣٥",
    "full-width digits": "４４+１９+３５",
    "superscript": "44+19+35²",
    "import": "__import__('os').system('touch X')",
    "import after the right answer": "44+19+35+0*__import__('os').system('touch X')",
    "import in a string": 'f\'{__import__("os").system("touch X")}\'',
    "open": "open('X', 'w')",
    "lambda": "(lambda: 98)()",
    "walrus": "(x:=98)",
    "attribute": "().__class__.__base__.__subclasses__()",
    "comprehension": "[x for x in range(10**12)]",
    "nested tags": "<answer>" * 500 + "44+19+35" + "</answer>" * 500,
    "tags": "<answer>" * DEEP,
    "closed tags": "<answer></answer>" * DEEP,
    "closing tags": "</answer>" * DEEP,
}


@pytest.mark.parametrize("written", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_answers_are_wrong_and_nothing_of_them_runs(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert answer(tagged(written)) == 0.0
        assert answer(written) == 0.0
        assert 0.0 <= form(tagged(written)) <= 1.0
        assert 0.0 <= form(written) <= 1.0
    assert not list(tmp_path.iterdir())


def test_the_module_needs_no_heavy_package():
    code = "import sys, es_lite.fitness.tasks.countdown; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "set()\n"


# The built-in problems


def solve(values: list[tuple[Fraction, str]], target: Fraction) -> str | None:
    """An expression that makes the target of all the values, found by trying every one."""
    if len(values) == 1:
        return values[0][1] if values[0][0] == target else None
    tried = set()
    for i, (a, left) in enumerate(values):
        for j, (b, right) in enumerate(values):
            if i == j or (a, b) in tried:
                continue
            tried.add((a, b))
            rest = [value for k, value in enumerate(values) if k not in (i, j)]
            results = [(a - b, f"({left}-{right})")]
            if i < j:
                results += [(a + b, f"({left}+{right})"), (a * b, f"({left}*{right})")]
            if b and a.denominator == b.denominator == 1 and a % b == 0:  # enough where all on the way is whole
                results.append((a // b, f"({left}/{right})"))
            for value, expression in results:
                if found := solve([*rest, (value, expression)], target):
                    return found
    return None


def problems(made: list[Row]) -> list[tuple[list[int], str]]:
    return [(row.columns["numbers"], row.columns["target"]) for row in made]


@pytest.fixture(scope="module")
def builtin() -> tuple[list[Row], list[Row]]:
    train, test = countdown.rows("", {}, 0)
    assert test is not None
    return train, test


def test_the_problems_of_a_seed_never_change(builtin):
    train, test = builtin
    text = json.dumps([problems(train)[:50], problems(test)[:50]])
    assert hashlib.sha256(text.encode()).hexdigest() == "e6e9b34a1101333196f5d4206060be87bc21599347117806fb8af94a6f43c58e"
    assert countdown.rows("", {}, 0) == builtin
    assert problems(countdown.rows("", {}, 1)[0]) != problems(train)


def test_every_problem_has_a_solution_that_the_reward_pays_for(builtin):
    train, test = builtin
    assert (len(train), len(test)) == (200, 2000)
    for row in train + test:
        numbers, target = row.columns["numbers"], row.columns["target"]
        expression = solve([(number, str(number)) for number in numbers], int(target))
        assert expression, row.where
        assert answer(tagged(expression), numbers, target) == 1.0, row.where
        assert form(tagged(expression)) == 1.0


def test_problems_are_in_range_and_not_trivial(builtin):
    for numbers, target in problems(builtin[0] + builtin[1]):
        assert len(numbers) == 4
        assert all(type(number) is int and 1 <= number <= 100 for number in numbers)
        assert target.isdecimal() and 1 <= int(target) <= 1000
        assert int(target) not in numbers
        assert int(target) != sum(numbers)


def test_no_problem_comes_twice_in_training_or_held_out(builtin):
    keys = [(*sorted(numbers), target) for numbers, target in problems(builtin[0] + builtin[1])]
    assert len(set(keys)) == 2200


def test_a_crowded_space_of_problems_still_gives_different_ones():
    train, test = countdown.rows("", {"numbers": 2, "largest": 10, "train": 60, "test": 60}, 3)
    assert len({(*sorted(numbers), target) for numbers, target in problems(train + test)}) == 120


def test_the_held_out_problems_do_not_depend_on_how_many_are_trained_on(builtin):
    assert countdown.rows("", {"train": 7}, 0)[1] == builtin[1]


def test_a_row_has_the_papers_columns_and_a_prompt_that_is_continued(builtin):
    row = builtin[0][0]
    numbers, target = row.columns["numbers"], row.columns["target"]
    assert list(row.columns) == ["id", "numbers", "target"]
    assert (row.columns["id"], row.where) == ("train-1", "builtin:countdown, problem train-1")
    assert json.loads(json.dumps(row.columns)) == row.columns
    assert [message["role"] for message in row.prompt] == ["system", "user", "assistant"]
    request, prefill = row.prompt[1]["content"], row.prompt[2]["content"]
    for part in (str(numbers), f"equals {target}.", "<think> </think>", "<answer> </answer>", "<answer> (1 + 2) / 3 </answer>"):
        assert part in request
    assert prefill == "Let me solve this step by step.\n<think>"


def test_options_change_the_problems():
    train, test = countdown.rows("", {"train": 40, "test": 50, "numbers": [3, 5], "largest": 9}, 0)
    assert (len(train), len(test)) == (40, 50)
    assert {len(numbers) for numbers, _ in problems(train)} == {3, 5}
    assert {number for numbers, _ in problems(train) for number in numbers} <= set(range(1, 10))


def test_targets_need_not_be_whole():
    train, test = countdown.rows("", {"whole": False, "train": 100, "test": 300, "numbers": 3}, 0)
    targets = [target for _, target in problems(train + test)]
    assert 20 < sum("." in target for target in targets) < 380
    for target in targets:
        assert target == str(float(target)).removesuffix(".0")
        assert len(target.partition(".")[2]) <= 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"numbrs": 4}, r'data\.options\.numbrs: unknown key; did you mean "numbers"\?'),
        ({"train": 0}, r"data\.options\.train = 0: expected a whole number from 1 to 100,000"),
        ({"test": 2.5}, r"data\.options\.test = 2\.5: expected a whole number"),
        ({"numbers": 1}, r"data\.options\.numbers = \(1,\): expected a whole number from 2 to 6, or a list"),
        ({"numbers": []}, r"data\.options\.numbers = \(\): expected"),
        ({"numbers": [3, 7]}, r"data\.options\.numbers = \(3, 7\): expected"),
        ({"numbers": "four"}, r"data\.options\.numbers = \('four',\): expected"),
        ({"largest": 1001}, r"data\.options\.largest = 1001: expected a whole number from 1 to 1,000"),
        ({"whole": 1}, r"data\.options\.whole = 1: expected true or false"),
        ({"largest": 1}, r"data\.options: too few different problems: found \d+ of the 2200"),
        ({"numbers": 2, "largest": 3}, r"too few different problems: found 12 of the 2200 .* or raise numbers or largest"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        countdown.rows("", options, 0)


# Problems from files


def test_problems_of_a_file(tmp_path):
    lines = (
        '{"id": 7, "numbers": [44, 19, 35], "target": "98", "context": "unused"}\n\n'
        '{"nums": [31, 2], "target": 15.5}\n{"nums": [1, 2], "target": 3}\n{"nums": [3, 4], "target": 12.0}\n'
        '{"numbers": [3, 800], "target": " 266.6666666666667 "}\n'
    )
    path = file(tmp_path, "a.jsonl", lines)
    made, held_out = countdown.rows(path, {}, 0)
    assert held_out is None
    assert [row.columns for row in made] == [
        {"id": 7, "numbers": [44, 19, 35], "target": "98"},
        {"id": 2, "numbers": [31, 2], "target": "15.5"},
        {"id": 3, "numbers": [1, 2], "target": "3"},
        {"id": 4, "numbers": [3, 4], "target": "12"},
        {"id": 5, "numbers": [3, 800], "target": "266.6666666666667"},
    ]
    assert [row.where for row in made] == [f"{path}:{line}" for line in (1, 3, 4, 5, 6)]
    assert "numbers [31, 2] into an expression that equals 15.5." in made[1].prompt[1]["content"]


def test_problems_of_a_json_list(tmp_path):
    path = file(tmp_path, "a.json", '[{"numbers": [1, 2], "target": 3},\n {"numbers": [1, 2], "target": "2"}]')
    assert problems(countdown.rows(path, {}, 0)[0]) == [([1, 2], "3"), ([1, 2], "2")]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"numbers": [1, 2]}', r'has no column "target" \(it has: numbers\); a problem needs "numbers" and "target"'),
        ('{"number": [1, 2], "target": 3}', r'has no column "numbers" \(it has: number, target\)'),
        ("{}", r'has no column "numbers" \(it has: none\)'),
        ('{"numbers": "1 2", "target": 3}', r'"numbers" is "1 2"; expected a list of 1 to 32 whole numbers'),
        ('{"numbers": null, "target": 3}', r'"numbers" is null; expected a list'),
        ('{"numbers": [], "target": 3}', r'"numbers" is \[\]; expected a list'),
        (json.dumps({"numbers": [1] * 33, "target": 3}), r'"numbers" is \[1, 1, .*…; expected a list of 1 to 32'),
        ('{"numbers": [1, 2.5], "target": 3}', r'"numbers" has 2\.5; expected whole numbers from 0 to 1,000,000,000'),
        ('{"numbers": [1, "2"], "target": 3}', r'"numbers" has "2"; expected'),
        ('{"numbers": [1, true], "target": 3}', r'"numbers" has true; expected'),
        ('{"numbers": [1, -2], "target": 3}', r'"numbers" has -2; expected'),
        ('{"numbers": [1, 10000000000], "target": 3}', r'"numbers" has 10000000000; expected'),
        ('{"numbers": [1, 2], "target": null}', r'"target" is null; expected a number such as 98 or "15\.5"'),
        ('{"numbers": [1, 2], "target": true}', r'"target" is true; expected'),
        ('{"numbers": [1, 2], "target": [3]}', r'"target" is \[3\]; expected'),
        ('{"numbers": [1, 2], "target": ""}', r'"target" is ""; expected'),
        ('{"numbers": [1, 2], "target": "three"}', r'"target" is "three"; expected'),
        ('{"numbers": [1, 2], "target": "1e999999999"}', r'"target" is "1e999999999"; expected'),
        ('{"numbers": [1, 2], "target": "31/2"}', r'"target" is "31/2"; expected'),
        ('{"numbers": [1, 2], "target": "٣"}', r'"target" is "٣"; expected'),
        ('{"numbers": [1, 2], "target": 1e300}', r'"target" is 1e\+300; expected'),
        ('{"numbers": [1, 2], "target": ' + "9" * 4000 + "}", r'"target" is 9{60}…; expected'),
        ('{"numbers": [1, 2], "target": ' + "9" * 5000 + "}", "has a number of more than 4,300 digits"),
        ('{"numbers": [1, 2], "target": NaN}', "NaN|nan"),
        ("[1, 2]", "expected an object"),
        ('{"numbers": [1, 2', "not JSON"),
    ],
)
def test_a_bad_row_is_told_with_file_and_line(line, message, tmp_path):
    path = file(tmp_path, "bad.jsonl", '{"numbers": [1, 2], "target": 3}\n\n' + line + "\n")
    with pytest.raises(UserError, match=rf"^.*bad\.jsonl:3: .*({message})"):
        countdown.rows(path, {}, 0)


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match=r"missing\.jsonl.*no such file"):
        countdown.rows(str(tmp_path / "missing.jsonl"), {}, 0)
    with pytest.raises(UserError, match=r"empty\.jsonl: there is no problem in it"):
        countdown.rows(file(tmp_path, "empty.jsonl", "\n"), {}, 0)
    path = file(tmp_path, "a.jsonl", '{"numbers": [1, 2], "target": 3}')
    with pytest.raises(UserError, match=r"data\.options\.train: problems from a file have no options"):
        countdown.rows(path, {"train": 5}, 0)
