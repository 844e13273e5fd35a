"""Generated problems: their text, their solutions, and that none is in both sets."""

import random

import pytest

from fastgrpo.config import DataConfig, UserError
from fastgrpo.data.arithmetic import ALPHABET, Problem, generate_rows


def config(**changes) -> DataConfig:
    return DataConfig(**{"source": "arithmetic", "num_problems": 500, "eval_size": 50, **changes})


@pytest.mark.parametrize(
    ("problem", "text", "solution", "answer"),
    [
        (Problem(347, 285, "+"), "347+285=", "7+5=12;4+8+1=13;3+2+1=06;#632", "632"),
        (Problem(999, 999, "+"), "999+999=", "9+9=18;9+9+1=19;9+9+1=19;#1998", "1998"),
        (Problem(0, 7, "+"), "0+7=", "0+7=07;#7", "7"),
        (Problem(632, 285, "-"), "632-285=", "2-5=17;3-8-1=14;6-2-1=03;#347", "347"),
        (Problem(500, 499, "-"), "500-499=", "0-9=11;0-9-1=10;5-4-1=00;#1", "1"),
        (Problem(250, 250, "-"), "250-250=", "0-0=00;5-5-0=00;2-2-0=00;#0", "0"),
    ],
)
def test_worked_solutions(problem, text, solution, answer):
    assert (problem.text, problem.solution, problem.answer) == (text, solution, answer)


@pytest.mark.parametrize(("operation", "sign"), [("addition", 1), ("subtraction", -1)])
def test_every_step_and_answer_is_right(operation, sign):
    train, held_out = generate_rows(config(operation=operation), seed=3)
    for row in [*train, *held_out]:
        left, right = (int(number) for number in row.values["prompt"].rstrip("=").replace("-", "+").split("+"))
        assert int(row.values["answer"]) == left + sign * right >= 0
        *columns, answer = row.values["solution"].split(";")
        assert answer == "#" + row.values["answer"]
        digits = [column.split("=")[1][1] for column in columns]
        carries = [int(column.split("=")[1][0]) for column in columns]
        value = int("".join(reversed(digits))) + (carries[-1] * 1000 if sign == 1 else 0)
        assert value == int(answer[1:])
        assert [len(column) for column in columns] == [6, 8, 8]


def test_all_characters_are_in_the_alphabet_and_all_of_it_occurs():
    rows = [
        *generate_rows(config(operation="addition"), seed=0)[0],
        *generate_rows(config(operation="subtraction"), seed=0)[0],
    ]
    assert {c for row in rows for value in row.values.values() for c in value} == set(ALPHABET)


def operands(rows):
    return [tuple(sorted(row.values["prompt"].rstrip("=").replace("-", "+").split("+"))) for row in rows]


@pytest.mark.parametrize("operation", ["addition", "subtraction"])
def test_sets_are_disjoint_also_with_operands_swapped(operation):
    # All 4095 two-digit problems: any overlap would show.
    train, held_out = generate_rows(config(operation=operation, num_digits=2, num_problems=4000, eval_size=95), seed=0)
    assert len(set(operands(train)) | set(operands(held_out))) == 4095


def test_training_follows_the_seed_and_held_out_problems_do_not():
    random.seed(1)
    train_0, held_out_0 = generate_rows(config(), seed=0)
    random.seed(2)
    again, _ = generate_rows(config(), seed=0)
    train_1, held_out_1 = generate_rows(config(), seed=1)
    assert train_0 == again
    assert train_0 != train_1
    assert held_out_0 == held_out_1
    assert generate_rows(config(eval_size=60), seed=0)[1][:50] == held_out_0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operation": "division"}, "data.operation=division is unknown; use addition or subtraction"),
        ({"num_digits": 0}, "data.num_digits=0 must be at least 1"),
        ({"num_problems": 0}, "data.num_problems=0 must be at least 1"),
        (
            {"num_digits": 1},
            "data.num_problems=500 and data.eval_size=50 ask for more than the 55 different 1-digit problems; "
            "lower them or raise data.num_digits",
        ),
    ],
)
def test_errors(changes, message):
    with pytest.raises(UserError) as error:
        generate_rows(config(**changes), seed=0)
    assert str(error.value) == message
