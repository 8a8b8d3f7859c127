"""--mode=serve: a local page on which a problem is typed and the base and the trained model are watched as they denoise it.

Requests can ask for one thing only, the denoising of a prompt, and that one at a time. By default only this machine can reach it.
"""

import contextlib
import ipaddress
import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import jax
import numpy as np

from diffpo_jax import data, denoisings, page, pareto
from diffpo_jax.build import Parts, grade
from diffpo_jax.evaluate import evaluated, load_curve, operating_point
from diffpo_jax.modes import need_one_host, restore
from diffpo_jax.sampling.unmasking import THRESHOLD_RULES
from diffpo_jax.structs import Prompts
from diffpo_jax.train import run_session

LARGEST_BODY = 16 * 1024  # bytes of a request
MOST_WAITING = 4  # requests that wait for the one that is computed
PATIENCE = 10.0  # seconds in which a request must arrive
PROBLEMS = 24  # test problems to pick from
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Refused(Exception):
    """A request that is answered with an error: its HTTP status, and what to say."""

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


def serve(config: Any, workdir: str) -> None:
    """Serves the page until Ctrl-C or SIGTERM.

    Raises:
      FileNotFoundError: there is no RL checkpoint.
      OSError: serve.host and serve.port cannot be listened at.
      ValueError, RuntimeError: as `train`.
    """
    need_one_host("serve")
    with run_session(config, workdir) as (parts, writer, stopped):
        run = restore(parts, workdir, writer, stopped)
        compute = make_compute(parts, run.base, run.params, run.threshold_params)
        settings = page_settings(parts, workdir)
        whole_page = make_page(parts, settings, run.step)
        compute({"prompt": settings["problems"][0], "gamma": settings["start"], "learned": settings["learned"]})  # compiles
        turn = threading.Lock()
        with contextlib.suppress(KeyboardInterrupt), listen(
            config.serve.host, config.serve.port, *whole_page, one_at_a_time(compute, turn)
        ) as server:
            print(f"serving step {run.step} of {workdir} at {url(server)} (Ctrl-C ends it)", flush=True)
            if not is_loopback(config.serve.host):
                print(f"whoever reaches this machine at {config.serve.host} can use it: serve.host = 127.0.0.1 is for this one only")
            while not stopped():
                time.sleep(0.1)
        turn.acquire()  # a computation under way ends, and none begins


# --- what is computed ---


def page_settings(parts: Parts, workdir: str) -> dict[str, Any]:
    """What the page is told: problems to pick from, the range of thresholds, where its slider starts, whether there are learned ones."""
    config = parts.config
    low, high = threshold_range(config)
    source = parts.sources["test"]
    return {
        "problems": [source[i]["prompt"] for i in evaluated(parts, PROBLEMS)],
        "thresholds": config.sampler.rule in THRESHOLD_RULES,
        "learned": "threshold_params" in operating_point(config, None),
        "low": low,
        "high": high,
        "start": min(max(start_threshold(config, workdir), low), high),
    }


def make_page(parts: Parts, settings: dict[str, Any], step: int) -> tuple[str, str]:
    """(HTML, Content-Security-Policy), see `page.render`."""
    name, seed = parts.task.name, parts.config.seed
    lead = "The base model and the model after RL start from a response that is all masks, and fill in what they are sure of, call by call."
    texts = {"kicker": f"diffpo_jax · {name}, seed {seed}, step {step}", "lead": lead, "note": f"Responses have {_length(parts)}."}
    return page.render("serve", f"{name}: denoising", texts, settings)


def _length(parts: Parts) -> str:
    task, blocks = parts.config.task, parts.config.sampler.block_length
    return f"{task.response_length} tokens{f' in blocks of {blocks}' if blocks else ''}, problems at most {task.prompt_length}"


def threshold_range(config: Any) -> tuple[float, float]:
    """The thresholds that can be asked for: those of evaluation and of the threshold network, and all between them."""
    known = [*config.eval.thresholds, config.threshold_network.gamma_min, config.threshold_network.gamma_max, config.sampler.threshold]
    known = [gamma for gamma in known if gamma > 0]  # the slider is logarithmic
    return float(min(known)), float(max(known))


def start_threshold(config: Any, workdir: str) -> float:
    """The base model's threshold of the run's report, where the run has got so far, else sampler.threshold."""
    try:
        [learned], base = load_curve(f"{workdir}/learned.npz")[0].values(), load_curve(f"{workdir}/base.npz")[0]
    except FileNotFoundError:
        return config.sampler.threshold
    return list(base)[pareto.nearest([each.nfe.mean() for each in base.values()], learned.nfe.mean())]


def make_compute(parts: Parts, base: Any, trained: Any, threshold_params: Any) -> Callable[[Any], dict[str, Any]]:
    """`compute({"prompt": text, "gamma": number, "learned": bool})`: {"prompt", "base", "trained"}, two records of `denoisings`.

    Always the same programs, of the fewest rows that the mesh can split, each with the prompt. A prompt that is a test problem's is
    graded. Raises `Refused` for a request that is not as above, or a prompt that the model cannot read.
    """
    rows = denoisings.whole_rows(parts, 1)
    run = denoisings.make_denoise(parts, rows)
    low, high = threshold_range(parts.config)
    source = parts.sources["test"]
    known = {source[i]["prompt"]: i for i in evaluated(parts, PROBLEMS)}
    network = operating_point(parts.config, threshold_params).get("threshold_params")

    def one(params, prompts, index, **choice):
        trajectory = jax.device_get(run(params, prompts, parts.key("serve"), **choice))
        confidence = denoisings.read_confidences(parts, params, trajectory)
        grades = None if index is None else grade(parts, "test", np.full(rows, index), trajectory.tokens)
        record = denoisings.to_records(parts, trajectory, confidence, grades, choice.get("threshold"))[0]
        return record | {"chosen": "threshold_params" in choice}

    def compute(asked):
        prompt, gamma, learned = check_request(asked, low, high)
        prompts, fixed = read_prompt(parts, prompt, rows), {"threshold": gamma}
        chosen = {"threshold_params": network} if learned and network is not None else fixed
        index = known.get(prompt)
        sides = {"base": one(base, prompts, index, **fixed), "trained": one(trained, prompts, index, **chosen)}
        return {"prompt": prompt} | sides

    return compute


def check_request(asked: Any, low: float, high: float) -> tuple[str, float, bool]:
    """(prompt, gamma, learned) of a request's JSON; raises `Refused` unless it is all of that, and gamma from `low` to `high`."""
    if not isinstance(asked, dict) or asked.keys() != {"prompt", "gamma", "learned"}:
        raise Refused(HTTPStatus.BAD_REQUEST, "a request is a JSON object with prompt, gamma and learned")
    prompt, gamma, learned = asked["prompt"], asked["gamma"], asked["learned"]
    if not isinstance(prompt, str) or not isinstance(learned, bool) or isinstance(gamma, bool) or not isinstance(gamma, int | float):
        raise Refused(HTTPStatus.BAD_REQUEST, "prompt is a text, gamma a number, learned true or false")
    if not low <= gamma <= high:  # nor a NaN
        raise Refused(HTTPStatus.BAD_REQUEST, f"the threshold is a number from {low:g} to {high:g}")
    if not prompt.strip():
        raise Refused(HTTPStatus.BAD_REQUEST, "there is no problem: type one, or pick a test problem")
    return prompt, float(gamma), learned


def read_prompt(parts: Parts, text: str, rows: int) -> Prompts:
    """`text` as the prompt of this host's rows of `rows`; raises `Refused`, in words for who typed it, where the model cannot read it."""
    config = parts.config
    characters = getattr(parts.tokenizer, "characters", ())  # of a tokenizer that knows some only
    unknown = sorted(set(text) - set(characters)) if characters else []
    if unknown:
        names, known = ", ".join(map(repr, unknown)), " ".join(characters).strip()
        raise Refused(HTTPStatus.BAD_REQUEST, f"this model cannot read {names}; the characters that it knows: {known}")
    try:
        tokens = len(parts.tokenizer.encode_prompt(text))
        if tokens > config.task.prompt_length and not config.data.d1_faithful:  # with which it is cut
            raise ValueError(f"the problem has {tokens} tokens, this model reads at most {config.task.prompt_length}: shorten it")
        batch = data.tokenise([{"prompt": text}], [0] * rows, parts.tokenizer, config)
    except ValueError as error:
        raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from None
    return Prompts(batch["prompt"], batch["prompt_mask"])


def one_at_a_time(compute: Callable[[Any], Any], turn: threading.Lock) -> Callable[[Any], Any]:
    """`compute`, which only who holds `turn` runs and at most `MOST_WAITING` others wait for; more are `Refused`."""
    places = threading.Semaphore(1 + MOST_WAITING)

    def in_turn(asked):
        if not places.acquire(blocking=False):
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests at once: try again in a moment")
        try:
            with turn:
                return compute(asked)
        finally:
            places.release()

    return in_turn


# --- the server ---


class Server(ThreadingHTTPServer):
    """A thread a connection; those that are left do not keep the program alive."""

    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that went away or never spoke is no news."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def listen(host: str, port: int, text: str, policy: str, compute: Callable[[Any], Any]) -> Iterator[Server]:
    """A running server of the page `text` and of `compute`.

    Raises:
      OSError: `host` and `port` cannot be listened at; the message says what to set.
    """
    kind = type("Server6", (Server,), {"address_family": socket.AF_INET6}) if ":" in host else Server
    try:
        server = kind((host, port), make_handler(is_loopback(host), text, policy, compute))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"cannot listen at serve.host = {host}, serve.port = {port} ({reason}); serve.port = 0 takes any free port") from None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def url(server: Server) -> str:
    """Where a browser finds the page."""
    host, port = str(server.server_address[0]), server.server_address[1]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`, a name or an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make_handler(local: bool, text: str, policy: str, compute: Callable[[Any], Any]) -> type[BaseHTTPRequestHandler]:
    """The handler of requests: GET / is the page, POST /denoise `compute` of its JSON; everything else is refused, with JSON {"error"}.

    Where only this machine is to reach the server (`local`), requests must be addressed to it by a name of this machine: a page from
    elsewhere whose name was made to point here (DNS rebinding) says its own. POST needs the content type of JSON, which pages from
    elsewhere may not send unasked.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = PATIENCE
        server_version, sys_version = "diffpo_jax", ""

        def do_GET(self):
            self.answer({"/": lambda: self.send(HTTPStatus.OK, text, "text/html")}, other={"/denoise": "POST"})

        def do_POST(self):
            self.answer({"/denoise": lambda: self.send_json(HTTPStatus.OK, compute(self.read_json()))}, other={"/": "GET"})

        def refuse_method(self):
            self.answer({}, other={"/": "GET", "/denoise": "POST"})

        do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = refuse_method

        def answer(self, routes, other):
            """Calls the route of the path, or says what is wrong; `other`: methods of the paths that have another one."""
            path = self.path.partition("?")[0]
            try:
                if local and _host_name(self.headers.get("Host", "")) not in LOOPBACK:
                    raise Refused(HTTPStatus.FORBIDDEN, "this server is for its own machine: use http://127.0.0.1 or http://localhost")
                if path in other:
                    raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, f"{path} takes {other[path]}")
                if path not in routes:
                    raise Refused(HTTPStatus.NOT_FOUND, "there is only the page at /")
                routes[path]()
            except Refused as refused:
                self.send_json(refused.status, {"error": str(refused)[:600]})
            except (ConnectionError, TimeoutError):
                raise
            except Exception:
                traceback.print_exc()
                self.send_json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "the computation failed: the terminal of the server says why"})

        def read_json(self):
            """The request's body."""
            if self.headers.get_content_type() != "application/json":
                raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the content type must be application/json")
            length = self.headers.get("Content-Length", "")
            if not (length.isascii() and length.isdigit()):
                raise Refused(HTTPStatus.LENGTH_REQUIRED, "a request must say its Content-Length")
            if int(length) > LARGEST_BODY:
                self.rfile.read(min(int(length), 64 * LARGEST_BODY))  # or else the client, still sending, would not see the answer
                raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has at most {LARGEST_BODY} bytes")
            try:
                return json.loads(self.rfile.read(int(length)))
            except (ValueError, RecursionError):
                raise Refused(HTTPStatus.BAD_REQUEST, "the request is not JSON") from None

        def send_json(self, status, value):
            self.send(status, json.dumps(value), "application/json")

        def send(self, status, content, kind):
            body = content.encode()
            self.send_response(status)
            for name, value in {
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Length": str(len(body)),
                "Content-Security-Policy": f"{policy}; frame-ancestors 'none'",
                "X-Content-Type-Options": "nosniff",
                "Referrer-Policy": "no-referrer",
                "Cross-Origin-Resource-Policy": "same-origin",
                "Cache-Control": "no-store",
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def send_error(self, code, message=None, explain=None):
            """What the library itself refuses: requests that are not HTTP."""
            self.send_json(HTTPStatus(code), {"error": message or HTTPStatus(code).phrase})

        def log_message(self, format, *args):
            pass

    return Handler


def _host_name(header: str) -> str:
    """'localhost' of 'localhost:8000'; '' where it is no host."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
