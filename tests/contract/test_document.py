"""The OpenAPI document is complete: nothing in it is without a description or an example."""

from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema_rs import Draft202012Validator

from todo_api.app import create_app
from todo_api.http.openapi import HEADERS, error_classes
from todo_api.settings import Settings

Json = dict[str, Any]

DOCUMENT = create_app(Settings.model_construct(), "postgresql://").openapi()
SCHEMAS = DOCUMENT["components"]["schemas"]
RESPONSES = DOCUMENT["components"]["responses"]
OPERATIONS = {
    operation["operationId"]: (path, operation)
    for path, operations in DOCUMENT["paths"].items()
    for operation in operations.values()
}
OWN_RESPONSES = [
    response
    for _, operation in OPERATIONS.values()
    for response in operation["responses"].values()
    if "$ref" not in response
]


def parts(part: Any) -> Iterator[Json]:
    """Iterate over every object in a part of the document."""
    if isinstance(part, dict):
        yield part
    for each in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from parts(each)


def shown(media: Json) -> list[Any]:
    """Return the examples of a body."""
    named = [each["value"] for each in media.get("examples", {}).values()]
    return [*named, media["example"]] if "example" in media else named


def assert_fits(example: object, schema: Json) -> None:
    within = {**schema, "components": {"schemas": SCHEMAS}}
    errors = [str(each) for each in Draft202012Validator(within).iter_errors(example)]
    assert not errors, example


@pytest.mark.parametrize("name", OPERATIONS)
def test_examples_of_every_response_fit_their_schema(name: str) -> None:
    responses = OPERATIONS[name][1]["responses"]
    assert any(status < "3" for status in responses)
    for response in responses.values():
        whole = RESPONSES[response["$ref"].rpartition("/")[2]] if "$ref" in response else response
        for media in whole.get("content", {}).values():
            assert shown(media)
            for example in shown(media):
                assert_fits(example, media["schema"])


def test_examples_of_every_request_body_fit_their_schema() -> None:
    bodies = [each["requestBody"] for _, each in OPERATIONS.values() if "requestBody" in each]
    assert len(bodies) == 12
    for body in bodies:
        for media in body["content"].values():
            assert shown(media)
            for example in shown(media):
                assert_fits(example, media["schema"])


def test_examples_of_parameters_headers_and_properties_fit_their_schema() -> None:
    parameters = [each for _, one in OPERATIONS.values() for each in one.get("parameters", [])]
    properties = [each for schema in SCHEMAS.values() for each in schema["properties"].values()]
    for schema in [*(each["schema"] for each in parameters), *properties, *SCHEMAS.values()]:
        for example in schema.get("examples", []):
            assert_fits(example, schema)
    for header in HEADERS.values():
        assert_fits(header["example"], header["schema"])


def test_every_response_has_description_headers_and_example() -> None:
    for response in [*RESPONSES.values(), *OWN_RESPONSES]:
        assert response["description"] not in {"", "Successful Response"}
        assert "X-Request-ID" in response["headers"]
        for media in response.get("content", {}).values():
            assert media.keys() & {"example", "examples"}, response


def test_every_error_is_an_example() -> None:
    shown = {code for each in RESPONSES.values() for code in error_examples(each)}
    assert shown == {each.code for each in error_classes()}
    for each in RESPONSES.values():
        for code, example in error_examples(each).items():
            assert example["value"]["code"] == code
            assert example["value"]["error"] == example["value"]["detail"] != ""
            has_fields = example["value"].keys() & {"fields", "codes"}
            assert bool(has_fields) == (code == "invalid_fields")


def error_examples(response: Json) -> Json:
    examples: Json = response["content"]["application/json"]["examples"]
    return examples


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_shares_the_errors(name: str) -> None:
    path, operation = OPERATIONS[name]
    responses = operation["responses"]
    assert responses["default"] == {"$ref": "#/components/responses/OtherError"}
    assert all("$ref" in response for status, response in responses.items() if status >= "4")
    assert operation["security"] == ([{"bearer": []}] if path.startswith("/api/") else [])
    assert operation["description"]


def test_every_summary_is_of_one_operation() -> None:
    summaries = [operation["summary"] for _, operation in OPERATIONS.values()]
    assert len(set(summaries)) == len(summaries)


def test_every_parameter_has_description_and_example() -> None:
    parameters = [each for _, one in OPERATIONS.values() for each in one.get("parameters", [])]
    assert parameters
    for parameter in parameters:
        assert parameter["description"], parameter
        assert parameter["schema"]["examples"], parameter


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_property_has_description_and_example(name: str) -> None:
    assert SCHEMAS[name]["description"]
    for member, schema in SCHEMAS[name]["properties"].items():
        assert schema["description"], member
        is_ignored = schema.keys() == {"title", "description"}
        assert is_ignored or schema["examples"], member


def test_schemas_are_plain() -> None:
    """Nothing that generators misread: see docs/api.md."""
    for part in parts(SCHEMAS):
        assert not part.keys() & {"pattern", "maxLength", "allOf", "not", "if"}
        assert ("oneOf" in part) == ("discriminator" in part)
        if choice := part.get("anyOf"):
            assert len(choice) == 2
            assert {"type": "null"} in choice or all("$ref" in each for each in choice)
        if part.get("type") == "integer":
            assert part["format"] == "int64"


def test_body_that_may_be_left_out_has_no_default() -> None:
    for name in ("complete_task", "complete_user_task"):
        body = OPERATIONS[name][1]["requestBody"]
        media = body["content"]["application/json"]
        assert not body.get("required", False)
        assert "default" not in media["schema"]
        assert media["example"] == {"completed": True}
    assert SCHEMAS["TaskChange"]["minProperties"] == 1


def test_document_names_server_tags_and_headers() -> None:
    assert DOCUMENT["servers"][0]["url"] == "/"
    described = {tag["name"] for tag in DOCUMENT["tags"] if tag["description"]}
    assert described == {tag for _, operation in OPERATIONS.values() for tag in operation["tags"]}
    assert {name for name, (_, each) in OPERATIONS.items() if each["tags"] == ["account"]} == {
        "delete_account",
        "delete_user_account",
    }
    used = {name for each in [*RESPONSES.values(), *OWN_RESPONSES] for name in each["headers"]}
    assert used == HEADERS.keys()
