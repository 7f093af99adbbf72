"""The command line: what flags accept, and how a mistake is told."""

import argparse

import pytest

from runtime.errors import UserError
from runtime.parser import Parser, add_shared_flags, duration, number


def parser():
    parser = Parser("What it does.")
    parser.add_argument("--count", type=number(int, 1, 9), default=3, help="how many")
    parser.add_argument("--rate", type=number(float, 0), default=0.5, help="how fast")
    parser.add_argument("--steps", type=number(int, 1), default=1, help="how far")
    parser.add_argument("--fast", action=argparse.BooleanOptionalAction, default=True, help="in a hurry")
    parser.add_argument("--large", type=number(int, 1, 10_000_000), default=1, help="a large number")
    parser.add_argument("--several", type=number(int, 1), nargs="*", help="some numbers")
    parser.add_argument("--pair", type=number(float, 0), nargs=2, help="two numbers")
    parser.add_argument("--files", nargs="+", help="some files")
    add_shared_flags(parser, "seed", "device")
    return parser


@pytest.mark.parametrize("argv, words", [
    (["--count", "0"], ["--count", "1..9", "'0'"]),
    (["--count", "10"], ["--count", "1..9", "'10'"]),
    (["--count", "2.5"], ["--count", "whole number", "'2.5'"]),
    (["--count", "many"], ["--count", "'many'"]),
    (["--count", ""], ["--count", "''"]),
    (["--rate", "-1"], ["--rate", "from 0 up", "'-1'"]),
    (["--rate", "nan"], ["--rate", "'nan'"]),
    (["--rate", "inf"], ["--rate", "'inf'"]),
    (["--seed", "-1"], ["--seed", "'-1'"]),
    (["--seed", str(2**63)], ["--seed"]),
    (["--unknown", "1"], ["--unknown", "--help"]),
    (["--large", "0"], ["--large", "1..10,000,000,", "'0'"]),
    (["--several", "5,x"], ["--several", "whole number", "'x'"]),
    (["--several", ","], ["--several", "','"]),
    (["--count", "5,6"], ["--count", "'5,6'"]),
    (["--cou", "1"], ["--cou"]),
])
def test_bad_flags_are_one_line_that_names_flag_value_and_range(argv, words):
    with pytest.raises(UserError) as caught:
        parser().parse_args(argv)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_a_whole_number_too_large_for_a_float_is_no_crash():
    try:
        assert parser().parse_args(["--steps", "1" + "0" * 400]).steps == 10**400
    except UserError as error:
        assert "--steps" in str(error)


def test_good_flags_become_numbers():
    args = parser().parse_args(["--count", "9", "--rate", "1e-3", "--seed", str(2**63 - 1)])
    assert (args.count, args.rate, args.seed, args.device) == (9, 1e-3, 2**63 - 1, "auto")


@pytest.mark.parametrize("argv, name, value", [
    (["--several", "5,10"], "several", [5, 10]), (["--several", "5", "10"], "several", [5, 10]),
    (["--several=5,10", "20"], "several", [5, 10, 20]), (["--several", "5,", "10,20"], "several", [5, 10, 20]),
    (["--several", "--count", "3"], "several", []), (["--pair", "1,2.5"], "pair", [1, 2.5]),
    (["--files", "a,b.png", "c.png"], "files", ["a,b.png", "c.png"]),
], ids=str)
def test_several_values_may_be_separated_by_commas(argv, name, value):
    assert getattr(parser().parse_args(argv), name) == value


def test_help_shows_every_default():
    text = " ".join(parser().format_help().split())
    assert all(f"(default: {value})" in text for value in (3, 0.5, 0, "auto"))


def test_help_tells_a_default_once():
    known = Parser("What it does.")
    known.add_argument("--width", type=int, default=3, help="how wide (default: by the height)")
    assert known.format_help().count("(default") == 1


@pytest.mark.parametrize("argv, near", [
    (["--cout", "3"], "--count"), (["--rat=2"], "--rate"), (["--sed", "1", "--count", "3"], "--seed"),
    (["--no-fats"], "--no-fast"), (["steps", "3"], "--steps")])
def test_a_mistyped_flag_is_told_the_one_that_is_like_it(argv, near):
    with pytest.raises(UserError, match=f"unrecognized arguments: {argv[0]}.*; did you mean {near}\\? ") as caught:
        parser().parse_args(argv)
    assert "\n" not in str(caught.value)


def test_a_flag_that_is_like_none_is_only_named():
    with pytest.raises(UserError, match="unrecognized") as caught:
        parser().parse_args(["--zzzzz"])
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("argv, fast", [([], True), (["--no-fast"], False), (["--no_fast"], False), (["--fast"], True),
                                        (["--no_fast", "--fast"], True)])
def test_a_switch_is_turned_off_by_both_spellings(argv, fast):
    known = parser()
    assert known.parse_args(argv).fast is fast and known.typed == ({"fast"} if argv else set())


def test_a_parser_knows_what_was_typed():
    known = parser()
    known.parse_args(["--count=3", "--rate", "1"])
    assert known.typed == {"count", "rate"}


@pytest.mark.parametrize("text, seconds", [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_durations_have_units(text, seconds):
    assert duration(text) == seconds
