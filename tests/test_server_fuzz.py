"""Whatever a client sends to the embedded server, it is told 4xx, and the server goes on as before."""

import json
import logging
import socket

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etagent_jax.policy.requests import FIELDS, LACKING, LACKING_SAMPLING, SAMPLING_DEFAULTS
from etagent_jax.policy.server import make_app
from tests.test_engine import CONFIG, make_engine, make_tokenizer, prompt
from tests.test_serving import running

VALID = {"input_ids": prompt(5), "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
POSTS = {
    "/generate": (*FIELDS, *LACKING),
    "/abort_request": ("rid", "abort_all"),
    "/pause_generation": ("mode",),
    "/continue_generation": ("torch_empty_cache",),
    "/update_weights_from_disk": ("model_path", "weight_version", "flush_cache", "load_format", "is_async"),
}
GETS = ("/health", "/health_generate", "/model_info", "/get_model_info", "/server_info", "/get_server_info")


class Server:
    """A served engine, a client of it, and what it logs as errors."""

    def __init__(self, url: str, client: httpx.Client):
        self.client = client
        self.address = (httpx.URL(url).host, httpx.URL(url).port)
        self.errors: list[logging.LogRecord] = []
        self.greedy = self._generate()

    def _generate(self) -> list[int]:
        return self.client.post("/generate", json=VALID).raise_for_status().json()["output_ids"]

    def post(self, path: str, content: bytes) -> httpx.Response:
        return self.client.post(path, content=content)

    def raw(self, sent: bytes) -> bytes:
        """What comes back for these bytes, after which the client sends no more."""
        with socket.create_connection(self.address, timeout=60) as connection:
            try:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                return b"".join(iter(lambda: connection.recv(1 << 16), b""))
            except OSError:  # closed before all was read
                return b""

    def check(self, status: int) -> None:
        """The answer was right, a redirect or a refusal, and the server generates what it did before."""
        assert status in (200, 307) or 400 <= status < 500, status
        assert not self.errors, self.errors[0].getMessage()
        assert self.client.post("/continue_generation", json={}).status_code == 200
        assert self._generate() == self.greedy


@pytest.fixture(scope="module")
def server():
    engine = make_engine()
    logger, handler = logging.getLogger("uvicorn.error"), logging.Handler(logging.ERROR)
    with running(make_app(engine, make_tokenizer(), "tiny")) as url, httpx.Client(base_url=url, timeout=60) as client:
        server = Server(url, client)
        handler.emit = server.errors.append
        logger.addHandler(handler)
        yield server
    logger.removeHandler(handler)
    engine.close()


fuzz = settings(max_examples=100, deadline=None)
strange_texts = st.sampled_from(["", "\x00", "\ud800", "/", "a" * 5000, "é", "9" * 5000, "٣", "default", "abort"])
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 3), st.floats(), st.text(), strange_texts,
    st.sampled_from([10**4000, -(10**400), 2**63, 2**64, 1e308, 5e-324, -0.0]),
)  # fmt: skip
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | strange_texts, inner, max_size=4),
    max_leaves=8,
)


def objects(names: tuple[str, ...], usual: dict) -> st.SearchStrategy[dict]:
    """`usual`, some of the names with strange values, and now and then a field that there is not."""
    strange = st.dictionaries(st.sampled_from(names), values, max_size=3)
    return st.builds(
        lambda a, b: {**usual, **a, **b}, strange, st.just({}) | st.dictionaries(st.text(), values, max_size=1)
    )


def encoded(body: object) -> bytes:
    return json.dumps(body).encode()  # NaN and Infinity too


@pytest.mark.parametrize("path", POSTS)
@fuzz
@given(data=st.data())
def test_fields_of_any_type_and_size(server, path, data):
    body = data.draw(objects(POSTS[path], VALID if path == "/generate" else {}))
    server.check(server.post(path, encoded(body)).status_code)


@fuzz
@given(parameters=objects((*SAMPLING_DEFAULTS, *LACKING_SAMPLING), VALID["sampling_params"]))
def test_sampling_parameters_of_any_type_and_size(server, parameters):
    server.check(server.post("/generate", encoded(VALID | {"sampling_params": parameters})).status_code)


@fuzz
@given(ids=st.lists(st.integers(0, CONFIG.vocab_size - 1) | leaves, max_size=200))
def test_ids_of_any_type_and_number(server, ids):
    response = server.post("/generate", encoded(VALID | {"input_ids": ids}))
    fits = 0 < len(ids) < 160 and all(type(i) is int and 0 <= i < CONFIG.vocab_size for i in ids)
    assert response.status_code == (200 if fits else 400)
    server.check(response.status_code)


@pytest.mark.parametrize("path", POSTS)
@fuzz
@given(data=st.data())
def test_bodies_that_are_no_json(server, path, data):
    whole = encoded(VALID)
    cut = st.integers(0, len(whole) - 1)
    damaged = st.builds(lambda i, junk: whole[:i] + junk + whole[i + 1 :], cut, st.binary(min_size=1, max_size=3))
    content = data.draw(st.binary() | cut.map(lambda n: whole[:n]) | damaged)
    server.check(server.post(path, content).status_code)


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize(
    "content",
    [
        b"[" * 500_000,
        b'{"a":' * 200_000,
        b'{"rid":' * 50_000 + b"1" + b"}" * 50_000,
        encoded({"input_ids": [0] * 300_000}),
        encoded({f"field{i}": i for i in range(50_000)}),
        encoded({"text": "ab " * 300_000}),
        encoded({"input_ids": [1], "sampling_params": {"stop": [""] * 200_000}}),
        b'{"rid": ' + b"9" * 900_000 + b"}",
        b'{"temperature": NaN, "mode": -Infinity, "rid": 1e999}',
        b"\xff\xfe{\x00}\x00",
        b'{"rid": "\xed\xa0\x80"}',
        encoded({"rid": "x"}).replace(b"}", b', "rid": {}}'),
        b" " * 3_000_000,
    ],
    ids=[
        "lists", "objects", "closed objects", "ids", "fields", "text", "stops", "digits", "constants", "utf-16",
        "utf-8", "twice", "spaces",
    ],
)  # fmt: skip
def test_enormous_and_deep_bodies(server, path, content):
    status = server.post(path, content).status_code
    assert status in (400, 413)
    server.check(status)


@fuzz
@given(
    method=st.sampled_from(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"]),
    path=st.sampled_from(
        [*POSTS, *GETS, "/flush_cache", "/", "//generate", "/generate/", "/GENERATE", "/%00", "/é?a=1"]
    ),
    header=st.text(st.characters(codec="latin-1", exclude_categories=["C"])).map(str.strip),
)
def test_methods_routes_and_headers(server, method, path, header):
    headers = {name: header.encode("latin-1") for name in ("X-SMG-Routing-Key", "Authorization", "Content-Type")}
    response = server.client.request(method, path, headers=headers, content=encoded(VALID))
    reads = method in ("GET", "HEAD") and path in (*GETS, "/flush_cache")
    right = reads or (method, path) in (("POST", "/generate"), ("POST", "/flush_cache"))
    assert (response.status_code == 200) == right
    server.check(response.status_code)


@fuzz
@given(length=st.integers(0, 200), kept=st.integers(0, 100), chunked=st.booleans())
def test_half_a_body_and_a_dropped_connection(server, length, kept, chunked):
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % length
    body = (b"%x\r\n" % length if chunked else b"") + encoded(VALID)[: min(kept, length)]
    answer = server.raw(b"POST /generate HTTP/1.1\r\nHost: x\r\n" + framing + b"\r\n\r\n" + body)
    server.check(int(answer.split()[1]) if answer else 200)


@fuzz
@given(sent=st.binary(max_size=200) | st.binary(max_size=50).map(lambda junk: b"POST /generate HTTP/1.1\r\n" + junk))
def test_bytes_that_are_no_request(server, sent):
    answer = server.raw(sent)
    server.check(int(answer.split()[1]) if answer else 400)


@pytest.mark.parametrize("header", [b"X: " + b"a" * 1_000_000, b"\r\n".join(b"X%d: a" % i for i in range(100_000))])
def test_headers_without_end_are_cut_off(server, header):
    answer = server.raw(b"GET /health HTTP/1.1\r\nHost: x\r\n" + header)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431")) or not answer
    server.check(400)
