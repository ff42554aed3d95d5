"""What stands before every request: whose page asks, how much it sends, which files it gets, what the page may load."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

BODY = 4 << 20  # bytes of a request that is no upload: settings, prompts and rows
MEDIA = (".mp4", ".webm", ".gif", ".mkv", ".png", ".jpg", ".jpeg", ".webp", ".json")
# Gradio's page needs inline scripts and its templates `Function`; what matters is that nothing comes from, or goes,
# elsewhere, and that no other page shows this one in a frame.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob: data:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """An ASGI middleware."""

    def __init__(self, app: Any, upload: int, closed: Path | None = None) -> None:
        """`closed` is a folder of which Gradio serves nothing, though it lies in one of which it does."""
        self.app, self.upload, self.closed = app, upload, closed

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path, headers = unquote(scope["path"]), dict(scope["headers"])
        refused = _foreign(scope["method"], headers) or _not_media(path, self.closed)
        limit = self.upload + (1 << 20) if path.endswith("/upload") else BODY
        size = headers.get(b"content-length", b"0")
        if refused is None and (not size.isdigit() or int(size[:18]) > limit):
            refused = 413, f"The request is larger than {limit:,} bytes."
        if refused is not None:
            return await _refuse(send, *refused)
        got = 0

        async def counted() -> Any:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > limit:  # sent in pieces, without saying how much there is
                return {"type": "http.disconnect"}
            return message

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in HEADERS}
                kept = [pair for pair in message.get("headers", []) if pair[0].lower() not in own]
                message = {**message, "headers": [*kept, *HEADERS]}
            await send(message)

        await self.app(scope, counted, guarded)


def _foreign(method: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
    """A page of another site may not make this one work, even blindly."""
    if method in ("GET", "HEAD", "OPTIONS"):
        return None
    origin = headers.get(b"origin", b"").decode("latin-1")
    host = headers.get(b"host", b"").decode("latin-1")
    if origin and urlsplit(origin).netloc != host:
        return 403, "Requests from other sites are refused."
    return None


def _not_media(path: str, closed: Path | None) -> tuple[int, str] | None:
    """Gradio serves whatever lies in the allowed folder, adapters and logs of training runs too; we want what was made
    to be looked at, and nothing that a browser would run."""
    name = path.partition("/file=")[2]
    if name and not name.lower().endswith(MEDIA):
        return 403, "Only clips, pictures and workflows are served."
    if name and closed is not None and _inside(closed, name):
        return 403, "Studies are looked at on the tabs Vote and Report."
    return None


def _inside(folder: Path, name: str) -> bool:
    try:
        return folder.resolve() in Path(name).resolve().parents
    except (OSError, ValueError):  # NUL, or too long for the system: no file
        return False


async def _refuse(send: Any, status: int, sentence: str) -> None:
    body = sentence.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode()), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
