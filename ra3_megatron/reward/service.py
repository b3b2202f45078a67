"""The judge behind HTTP, for machines without trainers: `ra3 judge serve`.

POST /judge takes a submission and answers with its verdict; GET /health says the isolation reached and how full the
queue is. A full queue answers 503 with Retry-After, a wrong secret 401, a request too large 413, a malformed one 400.
"""

import asyncio
import hmac
import ipaddress
import logging
import os
import signal
import socket
from concurrent.futures import Future
from dataclasses import replace

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.judge import JudgeConfig
from ra3_megatron.reward.judge import Judge
from ra3_megatron.reward.problem import Verdict
from ra3_megatron.reward.protocol import (
    FORMAT,
    HEALTH_PATH,
    JUDGE_PATH,
    MAX_BODY,
    ProtocolError,
    pack_verdict,
    read_secret,
    unpack_submission,
)

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
"""What a client is told to wait when the queue is full."""
CLIENT_GONE = 499
"""Status that nobody reads."""
GRACE_S = 30
"""Seconds that requests under way get to end after SIGTERM; then they are cut off, and their clients ask elsewhere."""


class Service:
    """The HTTP application over one judge, whose queue it keeps from ever blocking."""

    def __init__(self, judge: Judge, workers: int, capacity: int, secret: str | None) -> None:
        self._judge = judge
        self._workers = workers
        self._capacity = capacity
        self._expected = None if secret is None else f"Bearer {secret}".encode()
        self._pending = 0
        self.app = Starlette(
            routes=[
                Route(JUDGE_PATH, self._judged, methods=["POST"]),
                Route(HEALTH_PATH, self._health, methods=["GET"]),
            ]
        )

    def _refused(self, request: Request) -> Response | None:
        """The answer to somebody without the secret."""
        if self._expected is None:
            return None
        given = request.headers.get("authorization", "").encode()
        if hmac.compare_digest(given, self._expected):
            return None
        return JSONResponse({"error": "the secret is missing or wrong"}, 401)

    async def _health(self, request: Request) -> Response:
        refused = self._refused(request)
        state = {
            "format": FORMAT,
            "level": self._judge.level,
            "workers": self._workers,
            "pending": self._pending,
            "capacity": self._capacity,
        }
        return refused or JSONResponse(state)

    async def _judged(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        if self._pending >= self._capacity:
            return JSONResponse({"error": "the queue is full"}, 503, {"Retry-After": str(RETRY_AFTER_S)})
        self._pending += 1
        try:
            body = await _body(request)
            if body is None:
                return JSONResponse({"error": f"a request may have {MAX_BODY} bytes"}, 413)
            try:
                # Decoding megabytes, and the judge's lock, would hold up everybody else on this loop.
                future = await asyncio.to_thread(lambda: self._judge.submit(unpack_submission(body)))
            except (ProtocolError, UserError) as error:
                return JSONResponse({"error": str(error)}, 400)
            verdict = await _verdict_or_gone(future, request)
            if verdict is None:
                return Response(status_code=CLIENT_GONE)
            return Response(pack_verdict(verdict), media_type="application/json")
        finally:
            self._pending -= 1


async def _body(request: Request) -> bytes | None:
    """The request's body; None when it is larger than allowed."""
    declared = request.headers.get("content-length", "0")
    if not declared.isdigit() or int(declared) > MAX_BODY:
        return None
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            return None
    return bytes(body)


async def _verdict_or_gone(future: "Future[Verdict]", request: Request) -> Verdict | None:
    """The verdict; a client that hangs up before takes its submission out of the queue: None."""
    verdict = asyncio.ensure_future(asyncio.wrap_future(future))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        waited: set[asyncio.Future] = {verdict, gone}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        return verdict.result() if verdict.done() else None
    finally:
        gone.cancel()
        verdict.cancel()
        future.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(host: str, port: int, config: JudgeConfig, *, allow_unsafe: bool = False) -> None:
    """Serve until SIGTERM or Ctrl-C, then end what is under way; prints one line with the address.

    Raises:
        UserError: no secret on an address others can reach, a port that is taken, a judge that cannot start.
    """
    if config.backend != "local":
        raise UserError(f"judge.backend is {config.backend}; a service judges on its own machine: judge.backend=local")
    secret = None if config.secret_file is None else read_secret(config.secret_file)
    if secret is None and not is_loopback(host):
        raise UserError(
            f"--host {host} can be reached from other machines and judge.secret_file is not set; anybody could run "
            "programs here; set it, or bind to 127.0.0.1"
        )
    workers = config.workers or len(os.sched_getaffinity(0))
    listener = _bind(host, port)
    with listener, Judge(replace(config, workers=workers), allow_unsafe=allow_unsafe) as judge:
        service = Service(judge, workers, config.max_pending, secret)
        settings = uvicorn.Config(
            service.app, log_config=None, access_log=False, server_header=False, lifespan="off",
            timeout_graceful_shutdown=GRACE_S, timeout_keep_alive=75,
        )  # fmt: skip
        # uvicorn sends itself the signal again once it has stopped; this process then still has to close the judge.
        previous = signal.signal(signal.SIGTERM, lambda *_: None)
        address = f"[{host}]" if ":" in host else host
        print(
            f"judging at http://{address}:{listener.getsockname()[1]} (level {judge.level}, {workers} workers)",
            flush=True,
        )
        try:
            uvicorn.Server(settings).run(sockets=[listener])
        finally:
            signal.signal(signal.SIGTERM, previous)


def _bind(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024
        )
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port}: {error}; give another --host or --port") from None
