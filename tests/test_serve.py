"""What --mode=serve answers to requests, good and bad, with a computation that stands in for the models'."""

import http.client
import json
import socket
import threading
import time
from http import HTTPStatus
from types import SimpleNamespace

import numpy as np
import pytest

from configs import default
from diffpo_jax.evaluate import Evaluation, save_curve
from diffpo_jax.tokenizer import CharTokenizer
from tests.pages import serve_module

GOOD = {"prompt": "1+1", "gamma": 1.0, "learned": True}


def compute(asked):
    prompt, gamma, learned = serve_module.check_request(asked, 0.1, 8.0)
    if prompt == "fail":
        raise RuntimeError("no")
    return {"prompt": prompt, "gamma": gamma, "learned": learned}


@pytest.fixture(scope="module")
def server():
    with serve_module.listen("127.0.0.1", 0, "<p>page</p>", "default-src 'none'", compute) as server:
        yield server


def ask(server, method, path, body=None, **headers):
    """(status, headers, text)."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


def post(server, body, **headers):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, _, text = ask(server, "POST", "/denoise", body, **{"Content-Type": "application/json"} | headers)
    return status, json.loads(text)


def test_the_page_and_what_a_browser_may_do_with_it(server):
    status, headers, text = ask(server, "GET", "/?x=1")
    assert (status, text) == (200, "<p>page</p>")
    assert headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Content-Type"] == "text/html; charset=utf-8"
    assert "Python" not in headers["Server"]
    assert serve_module.url(server) == f"http://127.0.0.1:{server.server_address[1]}/"


def test_a_problem_is_answered(server):
    assert post(server, GOOD) == (200, GOOD)
    assert post(server, GOOD | {"prompt": "<img src=x onerror=1>é"})[1]["prompt"] == "<img src=x onerror=1>é"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "the request is not JSON"),
        (b"\xff", "the request is not JSON"),
        (b"[" * 15_000, "the request is not JSON"),
        ([], "a request is a JSON object with prompt, gamma and learned"),
        (GOOD | {"more": 1}, "a request is a JSON object with prompt, gamma and learned"),
        (GOOD | {"prompt": 3}, "prompt is a text, gamma a number, learned true or false"),
        (GOOD | {"gamma": "1"}, "prompt is a text, gamma a number, learned true or false"),
        (GOOD | {"gamma": True}, "prompt is a text, gamma a number, learned true or false"),
        (GOOD | {"learned": 1}, "prompt is a text, gamma a number, learned true or false"),
        (GOOD | {"gamma": float("nan")}, "the threshold is a number from 0.1 to 8"),
        (GOOD | {"gamma": 10**400}, "the threshold is a number from 0.1 to 8"),
        (GOOD | {"gamma": 0.05}, "the threshold is a number from 0.1 to 8"),
        (GOOD | {"prompt": " \n"}, "there is no problem: type one, or pick a test problem"),
    ],
)
def test_bad_input_is_400_in_plain_words(server, body, said):
    assert post(server, body) == (400, {"error": said})


def test_other_refusals(server, capfd):
    assert ask(server, "GET", "/../../etc/passwd")[0] == ask(server, "GET", "/page.css")[0] == ask(server, "POST", "/x", b"")[0] == 404
    assert ask(server, "GET", "/denoise")[0] == ask(server, "POST", "/", b"")[0] == ask(server, "PUT", "/", b"")[0] == 405
    assert ask(server, "OPTIONS", "/denoise", Origin="http://evil.example")[0] == 405  # so that other pages may not POST JSON
    assert post(server, GOOD, **{"Content-Type": "text/plain"})[0] == 415
    assert ask(server, "BREW", "/")[0] == 501
    assert post(server, GOOD | {"prompt": "fail"}) == (500, {"error": "the computation failed: the terminal of the server says why"})
    assert "RuntimeError: no" in capfd.readouterr().err
    assert post(server, GOOD)[0] == 200


@pytest.mark.parametrize("extra", [1, 300_000])
def test_a_body_that_is_too_large_is_413(server, extra):
    most = b" " * (serve_module.LARGEST_BODY - len(json.dumps(GOOD))) + json.dumps(GOOD).encode()
    assert post(server, most)[0] == 200
    status, answer = post(server, most + b" " * extra)
    assert (status, answer) == (413, {"error": "a request has at most 16384 bytes"})


@pytest.mark.parametrize("length", ["", "-1", "1e3", "²"])
def test_a_length_that_is_none_is_refused(server, length):
    with socket.create_connection(server.server_address[:2], timeout=20) as client:
        line = f"Content-Length: {length}\r\n" if length else ""
        client.sendall(f"POST /denoise HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{line}\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.0 411 ")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200),
        ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("[", 403), ("", 403),
    ],
)  # fmt: skip
def test_only_this_machines_names_are_answered_to(server, host, status):
    assert ask(server, "GET", "/", Host=host)[0] == ask(server, "POST", "/denoise", json.dumps(GOOD), Host=host, **{
        "Content-Type": "application/json"})[0] == status  # fmt: skip


def test_a_server_for_others_is_addressed_by_any_name():
    with serve_module.listen("0.0.0.0", 0, "page", "", compute) as server:
        assert ask(SimpleNamespace(server_address=("127.0.0.1", server.server_address[1])), "GET", "/", Host="box.example")[0] == 200
    assert [serve_module.is_loopback(host) for host in ("localhost", "127.0.0.9", "::1", "0.0.0.0", "box")] == [True] * 3 + [False] * 2


def test_a_port_that_is_taken_is_said(server):
    port = server.server_address[1]
    with pytest.raises(OSError, match=rf"cannot listen at serve.host = 127.0.0.1, serve.port = {port} .*in use.*serve.port = 0 takes any"):
        with serve_module.listen("127.0.0.1", port, "", "", compute):
            pass
    with pytest.raises(OSError, match="serve.port = 70000"):
        with serve_module.listen("127.0.0.1", 70000, "", "", compute):
            pass


def test_one_computation_at_a_time_and_few_that_wait():
    running, most, arrived, outcomes, release, lock = [], [], [], [], threading.Event(), threading.Lock()

    class Turn:
        """The lock, and how many have come to it."""

        def __enter__(self):
            arrived.append(1)
            lock.acquire()

        def __exit__(self, *_):
            lock.release()

    def slow(asked):
        running.append(asked)
        most.append(len(running))
        release.wait(20)
        running.remove(asked)
        return asked

    in_turn, places = serve_module.one_at_a_time(slow, Turn()), 1 + serve_module.MOST_WAITING
    threads = [threading.Thread(target=lambda i=i: outcomes.append(in_turn(i))) for i in range(places)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(arrived) < places and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(serve_module.Refused, match="too many requests at once: try again in a moment") as refused:
        in_turn(99)
    assert refused.value.status == HTTPStatus.SERVICE_UNAVAILABLE
    release.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == list(range(places)) and max(most) == 1
    assert in_turn(7) == 7  # places are given back


def make_parts(**fields):
    config = default.get_config()
    config.update_from_flattened_dict({"task.prompt_length": 6} | fields)
    return SimpleNamespace(config=config, tokenizer=CharTokenizer("123+"))


def test_a_typed_problem_becomes_a_prompt_or_words():
    prompts = serve_module.read_prompt(make_parts(), "1+23", 2)
    assert prompts.tokens.tolist() == [[0, 0, 4, 3, 5, 6]] * 2  # + 1 2 3 are 3 4 5 6
    assert prompts.mask.tolist() == [[False, False, True, True, True, True]] * 2
    for text, said in (
        ("1+2+3+1", "the problem has 7 tokens, this model reads at most 6: shorten it"),
        ("1+é\n", r"this model cannot read '\\n', 'é'; the characters that it knows: \+ 1 2 3$"),
    ):
        with pytest.raises(serve_module.Refused, match=said) as refused:
            serve_module.read_prompt(make_parts(), text, 2)
        assert refused.value.status == HTTPStatus.BAD_REQUEST


def test_the_range_of_thresholds_and_where_the_slider_starts(tmp_path):
    parts = make_parts(**{"eval.thresholds": (0.0, 0.3, 9.0), "sampler.threshold": 0.5})
    assert serve_module.threshold_range(parts.config) == (0.1, 9.0)
    assert serve_module.start_threshold(parts.config, str(tmp_path)) == 0.5  # a run that has not got to its report

    def curve(**nfe):
        return {float(gamma[1:]): Evaluation(*np.full((4, 3), calls), 1.0) for gamma, calls in nfe.items()}

    save_curve(tmp_path / "base.npz", curve(_1=8.0, _2=4.0, _3=1.0), "{}")
    save_curve(tmp_path / "learned.npz", curve(_0=3.0), "{}")
    assert serve_module.start_threshold(parts.config, str(tmp_path)) == 2.0
