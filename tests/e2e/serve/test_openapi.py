"""Requests made up from the server's own description: none may end in a server error."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

schemathesis = pytest.importorskip("schemathesis")


@pytest.fixture(scope="module")
def schema(live: Any) -> Any:
    return schemathesis.openapi.from_url(live.url + "/openapi.json")


def test_the_description_names_every_endpoint(schema: Any) -> None:
    paths = {operation.ok().path for operation in schema.get_all_operations()}
    assert paths >= {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/{name}",
        "/tokenize",
        "/detokenize",
        "/health",
        "/metrics",
    }


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_no_request_ends_in_a_server_error(schema: Any, live: Any, mode: Any) -> None:
    for operation in schema.get_all_operations():
        with contextlib.suppress(Unsatisfiable):  # a request without parameters cannot be wrong
            request_check(operation.ok().as_strategy(generation_mode=mode), live.url)()


def request_check(cases: st.SearchStrategy[Any], url: str) -> Callable[[], None]:
    """A test that sends requests drawn from `cases`."""

    @seed(5)
    @settings(
        max_examples=20,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases)
    def check(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens"), int):
            case.body["max_tokens"] = min(case.body["max_tokens"], 4)
        response = case.call(base_url=url)
        assert response.status_code < 500, response.text

    return check
