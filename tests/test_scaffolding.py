"""The tests' own scaffolding."""

from server import choose_server


def test_a_given_server_comes_first() -> None:
    assert choose_server({"TEST_DATABASE_URL": "postgresql://h/d"}, lambda: True) == (
        "TEST_DATABASE_URL"
    )


def test_docker_comes_before_the_embedded_server() -> None:
    assert choose_server({}, lambda: True) == "Docker"


def test_without_docker_the_server_is_embedded() -> None:
    assert choose_server({"TEST_DATABASE_URL": ""}, lambda: False) == "embedded"
