"""Our own addresses beside Gradio's: the scripts and styles, what the stack editor asks, and the clips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nodes import page
from nodes.engine.errors import AdapterNotFound, CogLoomError, UsageError
from nodes.host import ROOT, LocalHost, contained
from nodes.schema import sentence
from nodes.study import FOLDER as STUDIES

from .gallery import record

CLIPS = {".mp4": "video/mp4", ".webm": "video/webm", ".gif": "image/gif", ".mkv": "video/x-matroska",
         ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}  # fmt: skip
MADE = {".safetensors": "application/octet-stream", ".json": "application/json"}
REPORT = {".html": "text/html; charset=utf-8", ".svg": "image/svg+xml", ".csv": "text/csv; charset=utf-8",
          ".json": "application/json"}  # fmt: skip
STATIC = Path(__file__).parent / "static"


def add_routes(application: Any, folders: LocalHost) -> Callable[[Any], None]:
    """GET only. Returns what is to be told Gradio's own application when there is a login: who has signed in there may
    ask here."""
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.staticfiles import StaticFiles

    gate: dict[str, Any] = {"app": None}

    def may(request: Request) -> bool:
        inner = gate["app"]
        if inner is None:
            return True
        tokens = [value for name, value in request.cookies.items() if name.startswith("access-token-")]
        return any(inner.tokens.get(token) for token in tokens)

    def answer(look: Callable[[LocalHost, Any], Any]) -> Any:
        async def handler(request: Request) -> Response:
            if not may(request):
                return JSONResponse({"error": "Sign in first."}, status_code=401)
            try:
                found = await run_in_threadpool(look, folders, dict(request.query_params))
            except (AdapterNotFound, FileNotFoundError) as error:
                said = sentence(error) if isinstance(error, CogLoomError) else "There is no such file."
                return JSONResponse({"error": said}, status_code=404)
            except CogLoomError as error:
                return JSONResponse({"error": sentence(error)}, status_code=400)
            if not isinstance(found, Path):
                return JSONResponse(found)
            # A type of ours, never the file's word.
            kind = {**CLIPS, **REPORT, **MADE}[found.suffix.lower()]
            return FileResponse(found, media_type=kind, filename=found.name if look is made else None)

        return handler

    looks = {**page.ANSWERS, "clip": clip, "start": start, "record": record, "vote": vote, "report": report,
             "made": made}  # fmt: skip
    for name, look in looks.items():
        application.add_route(f"/cogloom/{name}", answer(look), methods=["GET"])
    application.add_route("/cogloom/shared.css", shared_styles, methods=["GET"])
    # Code that anybody may read; the login page needs it as well.
    application.mount("/cogloom/web", StaticFiles(directory=ROOT / "web"))
    application.mount("/cogloom/static", StaticFiles(directory=STATIC))
    application.mount("/scripts", StaticFiles(directory=STATIC / "scripts"))

    def signed_in(inner: Any) -> None:
        gate["app"] = inner

    return signed_in


def shared_styles(request: Any) -> Any:
    """The styles of the stack editor and the player for a page of Gradio's, which says how all fields and buttons look
    inside `.gradio-container-VERSION`: nested in a class said twice, ours count for more."""
    from starlette.responses import Response

    sheets = "".join((ROOT / "web" / name).read_text(encoding="utf-8") for name in ("cogloom.css", "player.css"))
    return Response(f".gradio-container.gradio-container {{\n{sheets}\n}}\n", media_type="text/css")


def clip(folders: LocalHost, query: Any) -> Path:
    """What was made: `name` in the output folder, or with `temp` in the temporary one. Clips of studies are shown by
    the Vote tab, without their names, and by reports."""
    found = _media(folders.temp_folder if query.get("temp") else folders.output_folder, query.get("name", ""))
    if (folders.output_folder / STUDIES).resolve() in found.parents:
        raise UsageError("Studies are looked at on the tabs Vote and Report.")
    return found


def start(folders: LocalHost, query: Any) -> Path:
    """A picture or video that a render starts from. Only what the app has put there: the rest of that folder is for
    graphs, and not to be looked through by whoever reaches the page."""
    name = query.get("name", "")
    if not name.startswith("cogloom-") or "/" in name or "\\" in name:
        raise UsageError("There is no such picture or video.")
    return _media(folders.input_folder, name)


def vote(folders: LocalHost, query: Any) -> Path:
    """A side of a pair of the Vote tab."""
    from .vote_tab import clip as side  # with Gradio, which this module does without

    return side(folders, query)


def report(folders: LocalHost, query: Any) -> Path:
    """A file of a study's report, which the app has written with every name in it escaped."""
    from .report_tab import file

    return file(folders, query)


def made(folders: LocalHost, query: Any) -> Path:
    """A file that the Workshop tab has made since the app began, by the word that its page was told."""
    from .workshop_tab import file

    return file(folders, query)


def _media(folder: Path, name: str) -> Path:
    try:
        path = contained(folder, name)
        there = path.is_file()
    except (ValueError, OSError) as error:  # NUL, or too long for the system
        raise UsageError("This cannot be the name of a file.") from error
    if path.suffix.lower() not in CLIPS:
        raise UsageError(f"Only {', '.join(CLIPS)} are served.")
    if not there:
        raise FileNotFoundError(name)
    return path
