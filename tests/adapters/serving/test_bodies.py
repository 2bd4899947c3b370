"""Bodies are what their classes declare: one reader, one word for each fault, one document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar

import msgspec
import pytest

from calls import Alphabet
from paged_serving import ChatBody, CompletionBody, ProtocolError, ServedModel, TGIBody, TokenizeBody, body_schema
from paged_serving.protocol.bodies import Body, Defaults, between, must, only, wide
from paged_serving.protocol.reading import read_body, unknown_fields


class Part(Body, frozen=True):
    name: str
    share: Annotated[float, between(0, 1)] = 0.5


class Whole(Body, frozen=True):
    elsewhere: ClassVar[Mapping[str, str]] = {"digit": "is another's name; use number"}
    number: Annotated[int, between(1, 9)] = 3
    large: Annotated[int, wide(0, 2**64 - 1)] | None = None
    flag: bool = False
    words: Annotated[str | list[str], must("a word, or words")] | None = None
    places: list[int | list[int]] | None = None
    part: Part | None = None
    parts: list[Part] = msgspec.field(default_factory=list)
    tools: Annotated[Any, only([], False, why="can't be had; leave it out")] = None

    @classmethod
    def defaults(cls, served: Any, wished: Mapping[str, Any]) -> Defaults:
        return {cls: {"number": 7}, Part: {"share": 0.25}}


SERVED: Any = SimpleNamespace(strict_fields=True)  # the classes above ask nothing else of it
LENIENT: Any = SimpleNamespace(strict_fields=False)


@pytest.fixture(scope="module")
def served() -> Iterator[ServedModel]:
    alphabet = Alphabet()
    with alphabet.engine:
        yield alphabet.served


@pytest.mark.parametrize(
    ("value", "param", "told"),
    [
        ([], None, "the body must be a JSON object"),
        ({"number": 0}, "number", "number is 0; it must be an integer from 1 to 9"),
        ({"number": True}, "number", "number is true; it must be an integer from 1 to 9"),
        ({"number": 2.5}, "number", "number is 2.5; it must be an integer from 1 to 9"),
        ({"number": "3"}, "number", 'number is "3"; it must be an integer from 1 to 9'),
        ({"number": 10**30}, "number", f"number is {10**30}; it must be an integer from 1 to 9"),
        ({"large": 2**64}, "large", f"large is {2**64}; it must be an integer from 0 to {2**64 - 1}"),
        ({"large": -1}, "large", f"large is -1; it must be an integer from 0 to {2**64 - 1}"),
        ({"flag": "yes"}, "flag", 'flag is "yes"; it must be true or false'),
        ({"words": 7}, "words", "words is 7; it must be a word, or words"),
        ({"words": ["a", 7]}, "words[1]", "words[1] is 7; it must be a string"),
        ({"places": [[1], 2, "3", 4.5]}, "places[2]", 'places[2] is "3"; it must be an integer or a list of integers'),
        (
            {"places": [1, [2, None]]},
            "places[1]",
            "places[1] is [2, null]; it must be an integer or a list of integers",
        ),
        ({"words": "x" * 99, "flag": 1}, "flag", "flag is 1; it must be true or false"),
        ({"words": {"x" * 99: 1}}, "words", 'words is {"' + "x" * 58 + "...; it must be a word, or words"),
        ({"part": "a"}, "part", 'part is "a"; it must be a JSON object'),
        ({"part": {}}, "part.name", "part.name is missing; it must be a string"),
        ({"part": {"name": None}}, "part.name", "part.name is missing; it must be a string"),
        ({"part": {"name": "a", "share": 2}}, "part.share", "part.share is 2; it must be a number from 0 to 1"),
        ({"parts": [{"name": "a"}, {"name": 1}]}, "parts[1].name", "parts[1].name is 1; it must be a string"),
        ({"tools": [1]}, "tools", "tools can't be had; leave it out"),
        ({"tools": 0}, "tools", "tools can't be had; leave it out"),
        ({"x": 1}, "x", "x is not a field that this server knows"),
        ({"part": {"name": "a", "x": 1}}, "part.x", "part.x is not a field that this server knows"),
        ({"parts": [{"name": "a", "x": 1}]}, "parts[0].x", "parts[0].x is not a field that this server knows"),
    ],
)
def test_the_field_at_fault_is_told_with_what_it_holds_and_what_it_must_be(
    value: Any, param: str | None, told: str
) -> None:
    with pytest.raises(ProtocolError) as refused:
        read_body(Whole, value, SERVED)
    assert (str(refused.value), refused.value.param) == (told, param)


def test_null_counts_as_left_out_and_three_point_nought_is_three() -> None:
    nothing = {"number": None, "part": None, "parts": None, "x": None, "tools": None}
    assert read_body(Whole, nothing, SERVED) == read_body(Whole, {}, SERVED)
    assert read_body(Whole, {"number": 3.0, "large": 2**64 - 1, "tools": []}, SERVED).number == 3
    parts = read_body(Whole, {"parts": [{"name": "a", "share": 1, "x": None}]}, SERVED).parts
    assert (parts[0].name, parts[0].share) == ("a", 1.0)


UNKNOWN = {
    "number": 3, "x": 1, "gone": None, "part": {"name": "a", "y": 2, "share": 1, "none": None},
    "parts": [{"name": "b", "z": 3}, {"name": "c", "z": 4, "y": [{"x": 1}]}],
}  # fmt: skip


def test_fields_that_nobody_knows_are_left_out_and_named_once_each() -> None:
    assert unknown_fields(UNKNOWN, Whole) == ["x", "part.y", "parts[].z", "parts[].y"]
    part = {"name": "a", "share": 1}
    assert read_body(Whole, UNKNOWN, LENIENT) == read_body(
        Whole, {"number": 3, "part": part, "parts": [{"name": "b"}, {"name": "c"}]}, SERVED
    )
    with pytest.raises(ProtocolError):
        read_body(Whole, UNKNOWN, SERVED)
    assert unknown_fields([], Whole) == []


def test_fields_that_other_bodies_have_are_refused_with_the_name_that_they_have_here() -> None:
    for served in (SERVED, LENIENT):
        with pytest.raises(ProtocolError, match="digit is another's name; use number"):
            read_body(Whole, {"digit": 3}, served)
    assert unknown_fields({"digit": 3}, Whole) == []


def test_a_wrong_field_is_told_whatever_stands_beside_it() -> None:
    with pytest.raises(ProtocolError, match=r"part\.share is 2"):
        read_body(Whole, {"x": 1, "part": {"name": "a", "y": 2, "share": 2}}, LENIENT)


def test_what_is_left_out_is_as_the_class_says_for_this_model() -> None:
    found = read_body(Whole, {"part": {"name": "a"}}, SERVED)
    assert (found.number, found.part) == (7, Part(name="a", share=0.25))
    fields = body_schema(Whole, SERVED)["properties"]
    assert (fields["number"]["default"], fields["part"]["properties"]["share"]["default"]) == (7, 0.25)


def test_advice_of_the_models_makers_is_not_for_beams() -> None:
    alphabet = Alphabet()
    with alphabet.engine:
        alphabet.served.defaults = {"temperature": 0.6, "top_k": 20}
        drawn, beams = (
            read_body(CompletionBody, {"prompt": "A", "use_beam_search": asked}, alphabet.served)
            for asked in (False, True)
        )
    assert (drawn.temperature, drawn.top_k, beams.temperature, beams.top_k) == (0.6, 20, 1.0, 0)


@pytest.mark.parametrize("body", [ChatBody, CompletionBody, TGIBody, TokenizeBody])
def test_each_field_of_each_body_stands_in_its_document(body: type[Body], served: ServedModel) -> None:
    schema = body_schema(body, served)
    assert schema["properties"].keys() == {field.name for field in msgspec.structs.fields(body)}
    assert "$ref" not in msgspec.json.encode(schema).decode()
