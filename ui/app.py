"""The app as a page: its frame, its tabs, and the server that shows it."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import ipaddress
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.machinery import PathFinder
from typing import Any

from nodes.engine import VERSION
from nodes.engine.errors import UsageError
from nodes.host import LocalHost

from . import text
from .work import GPU, warm

QUEUE = 16  # events that may wait; one more is told so
UPLOAD = 256 << 20  # bytes of a file
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Ui:
    """What the tabs are built with. Components are made in the order of the page; `replace` adds those of a tab for the
    tabs after it."""

    folders: LocalHost
    page: Any = None  # the Blocks, for `load` events
    language: Any = None  # a component: "en" or "zh"
    queue: dict[str, Any] = field(default_factory=lambda: dict(GPU))  # for events that touch a model
    rows: Any = None  # a component: the Render tab's stack, as the JSON text of its rows
    gallery: Any = None  # a component; `.then(ui.made, outputs=[ui.gallery])` shows what was made since
    screen: tuple[Any, ...] = ()  # components: inputs of a handler that wants what is set on the Render tab
    settings_of: Callable[..., dict[str, Any]] = dict  # their values -> the settings that `nodes.export` takes
    status: Any = None  # a component; `.then(ui.state, outputs=[ui.status])`
    told: list[tuple[Any, Callable[[str], dict[str, Any]]]] = field(default_factory=list)

    def host(self, request: Any = None) -> LocalHost:
        """For one piece of work: the app's folders, a stop event of its own."""
        return replace(self.folders, stop=threading.Event(), on_progress=None)

    def t(self, key: str, language: str, **values: Any) -> str:
        return text.text(key, language, **values)

    def said(self, component: Any, **keys: str | Callable[[str], str]) -> Any:
        """The component, whose properties (label, info, placeholder, value) are these texts in the page's language."""

        def update(language: str) -> dict[str, Any]:
            return {name: key(language) if callable(key) else text.text(key, language) for name, key in keys.items()}

        self.told.append((component, update))
        return component

    def made(self) -> Any:
        from .gallery import listed

        return listed(self.folders)

    def state(self) -> Any:
        from .status import state

        return state()


def build(folders: LocalHost) -> Any:
    """The page, as Gradio's Blocks."""
    import gradio as gr

    from . import api, compare_tab, persist, render_tab, report_tab, status, sweep_tab, vote_tab

    with gr.Blocks(title="CogLoom", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as page:
        ui = Ui(folders, page)
        api.build(ui)  # first, so that its names are these and not those of the page's own handlers
        with gr.Row(elem_id="cl-head"):
            head = gr.HTML(html_template=_HEAD, elem_id="cl-title", apply_default_css=False)
            head.js_on_load = "import('/cogloom/static/app.js').then((m) => m.header(element));"
            choices = [(name, code) for code, name in text.LANGUAGES.items()]
            language = gr.Radio(choices, value="en", show_label=False, container=False, elem_id="cl-language",
                                min_width=120, scale=0)  # fmt: skip
        ui = replace(ui, language=ui.said(language, label="language"))
        ui = replace(ui, status=status.build(ui))
        with gr.Tabs(elem_id="cl-tabs"):
            with ui.said(gr.Tab(id="render"), label="tab_render"):
                ui, render = render_tab.build(ui)
            with ui.said(gr.Tab(id="compare"), label="tab_compare"):
                compare = compare_tab.build(ui, render)
            studies = [module.build(ui) for module in (sweep_tab, vote_tab, report_tab)]
            for name in ("adapters_tab", "workshop_tab", "workflows_tab", "train_tab"):
                if importlib.util.find_spec(f"ui.{name}"):
                    importlib.import_module(f"ui.{name}").build(ui)

        def asked_for() -> None:
            warm()

        page.load(asked_for, queue=False, show_progress="hidden", api_visibility="private")
        persist.build(ui, {name: one for tab in (render, compare, *studies) for name, one in tab.kept.items()})
        _lighten(page)
    for component, update in ui.told:  # English until the page says otherwise
        for name, value in update("en").items():
            setattr(component, name, value)
    return page


def _lighten(page: Any) -> None:
    """What costs the browser seconds and shows nothing. Gradio's page searches the tree of all components for each one
    that an event reports to, whenever the event begins, tells and ends, and whether or not the progress is shown; and
    in the tree is one more component for each value that goes into or comes out of a named endpoint."""
    from gradio.components.api_component import Api

    for block in page.blocks.values():
        if isinstance(block, Api) and block.parent is not None:
            block.parent.children.remove(block)
            block.get_config = partial(_unseen, block)
    for event in page.fns.values():
        if event.show_progress == "hidden":
            event.show_progress_on = []


def _unseen(block: Any, of: Any = None) -> dict[str, Any]:
    """Its part in the page's configuration: what is not invisible, the page waits for."""
    return {**type(block).get_config(block, of), "visible": False}


_HEAD = """<div class="cl-title"><span class="cl-logo" aria-hidden="true"></span><h1>CogLoom</h1>
<p class="cl-tagline"></p><button type="button" class="cl-theme"></button></div>"""


def serve(
    folders: LocalHost,
    port: int = 7860,
    listen: str = "127.0.0.1",
    auth: str | None = None,
    mcp: bool = False,
    open_page: bool = False,
    queue: int = QUEUE,
    hosts: Sequence[str] = (),
) -> int:
    """Show the app until Ctrl-C.

    Raises:
        UsageError: an address that others reach without `auth`, a port that is taken.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UsageError("The app needs the package gradio: pip install -r requirements.txt -c constraints.txt")
    _checked_user(listen, auth)
    _check_free(listen, port)
    import uvicorn

    gc.disable()  # a quarter of the start is looking through what stays anyway; on again when the page is there
    try:
        application = application_of(folders, port, listen, auth, mcp, queue, hosts)
    except BaseException:  # it goes on to whoever called
        gc.enable()
        raise
    shown = f"http://{'127.0.0.1' if listen in ('0.0.0.0', *LOOPBACK) else listen}:{port}/"

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                gc.freeze()
                gc.enable()
                print(f"CogLoom {VERSION}: {shown}  (Ctrl-C ends it)", flush=True)
                if open_page:
                    import webbrowser

                    threading.Thread(target=webbrowser.open, args=(shown,), daemon=True).start()

    config = uvicorn.Config(application, host=listen, port=port, log_level="warning", timeout_graceful_shutdown=2)
    try:
        Server(config).run()
    except KeyboardInterrupt:  # how uvicorn ends on Ctrl-C
        pass
    finally:
        gc.enable()
    return 0


def application_of(
    folders: LocalHost,
    port: int = 7860,
    listen: str = "127.0.0.1",
    auth: str | None = None,
    mcp: bool = False,
    queue: int = QUEUE,
    hosts: Sequence[str] = (),
) -> Any:
    """The whole server as an ASGI application: the page, our own routes, and the guards in front of both.

    Raises:
        UsageError
    """
    user = _checked_user(listen, auth)
    _quiet(folders)
    if mcp and importlib.util.find_spec("mcp") is None:
        raise UsageError("--mcp needs the package mcp: pip install 'gradio[mcp]'.")
    _import_gradio()
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from nodes.study import FOLDER as STUDIES

    from .guard import Guard
    from .routes import add_routes

    page = build(folders)
    page.queue(max_size=queue, default_concurrency_limit=4)
    application = FastAPI(title="CogLoom", docs_url=None, redoc_url=None, openapi_url=None)
    signed_in = add_routes(application, folders)
    # Outermost last: a foreign Host is refused before anything looks at what it asks.
    application.add_middleware(Guard, upload=UPLOAD, closed=folders.output_folder / STUDIES)
    application.add_middleware(TrustedHostMiddleware, allowed_hosts=_hosts(listen, hosts), www_redirect=False)
    gr.mount_gradio_app(
        application, page, "/", server_name=listen, server_port=port, auth=user, ssr_mode=False, run_history=False,
        mcp_server=mcp, max_file_size=UPLOAD, allowed_paths=[str(folders.output_folder.resolve())],
        footer_links=["api"], theme=_theme(), head=_page_head(), show_error=True,
    )  # fmt: skip
    if mcp and not page.mcp_server:  # Gradio goes on without it, and would say so only where it was launched
        why = page.mcp_error or "Gradio does not say why"
        raise UsageError(f"--mcp cannot be: {why}. pip install 'gradio[mcp]' has what fits.")
    # Gradio looks whether a file that a page names is an upload of its own only in Blocks that were launched, and these
    # are mounted: without this, any file of the machine could be named.
    page.has_launched = True
    mounted: list[Any] = [getattr(route, "app", None) for route in application.routes]
    inner = next(one for one in mounted if getattr(one, "blocks", None) is page)
    signed_in(inner if user else None)
    return application


def _quiet(folders: LocalHost) -> None:
    """Before Gradio is imported: no analytics, no questions to any hub, its temporary files among ours."""
    folders.output_folder.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_RUN_HISTORY"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str((folders.cache_folder / "app").resolve())
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


class _NoStubs:
    """A finder of modules, for the time of one import.

    Gradio writes a stub for editors beside each module of components: at every import it parses them all, renders the
    stub and compares it, a third of its start. Nothing reads them here. There is no switch for it.
    """

    @staticmethod
    def find_spec(name: str, path: Any, target: Any = None) -> Any:
        if name != "gradio.component_meta":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                module.create_or_modify_pyi = lambda *_: None

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _import_gradio() -> None:
    sys.meta_path.insert(0, _NoStubs)
    try:
        import gradio  # noqa: F401
    finally:
        sys.meta_path.remove(_NoStubs)


def _checked_user(listen: str, auth: str | None) -> tuple[str, str] | None:
    """Who may use it; None is whoever is at this machine. Raises UsageError."""
    if auth is None and not _is_loopback(listen):
        raise UsageError(
            f"--listen {listen} lets others reach this machine; say who may with --auth USER:PASSWORD, or leave "
            "--listen out and reach it from here alone."
        )
    if auth is None:
        return None
    name, colon, password = auth.partition(":")
    if not colon or not name or not password:
        raise UsageError("--auth is USER:PASSWORD, neither of them empty.")
    return name, password


def _is_loopback(listen: str) -> bool:
    if listen == "localhost":
        return True
    try:
        return ipaddress.ip_address(listen).is_loopback
    except ValueError:
        return False


def _hosts(listen: str, more: Sequence[str]) -> list[str]:
    """Names by which this server may be asked for; any other means that a page elsewhere has pointed its own name
    here."""
    names = ["127.0.0.1", "localhost", *more]
    if not _is_loopback(listen):
        names += [socket.gethostname(), listen]
        with contextlib.suppress(OSError):  # a machine without a name is still asked for by its address
            names += {str(found[4][0]) for found in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    return names


def _check_free(listen: str, port: int) -> None:
    """Better said now than after seconds of imports. Raises UsageError."""
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if sys.platform != "win32":  # there it would let two programs have one port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((listen, port))
        except (OSError, OverflowError) as error:
            raise UsageError(f"Port {port} of {listen} cannot be had ({error}); choose another with --port.") from None


@cache
def _theme() -> Any:
    """System fonts: Gradio's own would be fetched from Google."""
    import gradio as gr

    fonts = ["Inter", "system-ui", "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif"]
    return gr.themes.Base(
        primary_hue=gr.themes.colors.indigo, secondary_hue=gr.themes.colors.indigo, neutral_hue=gr.themes.colors.zinc,
        radius_size=gr.themes.sizes.radius_md, spacing_size=gr.themes.sizes.spacing_md, font=fonts,
        font_mono=["ui-monospace", "Consolas", "monospace"],
    ).set(  # Gradio's grey for what explains is too faint to read
        body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400",
        block_label_text_color="*neutral_700", block_title_text_color="*neutral_800",
        block_title_text_color_dark="*neutral_200",
    )  # fmt: skip


def _page_head() -> str:
    said = {code: {key: pair[n] for key, pair in text.ALL.items()} for n, code in enumerate(text.LANGUAGES)}
    table = json.dumps(said, ensure_ascii=False).replace("<", "\\u003c")
    return (
        f'<script type="application/json" id="cogloom-text">{table}</script>'
        '<meta name="referrer" content="no-referrer">'
        '<link rel="stylesheet" href="/cogloom/web/cogloom.css">'
        '<link rel="stylesheet" href="/cogloom/shared.css"><link rel="stylesheet" href="/cogloom/static/app.css">'
        '<script type="module" src="/cogloom/static/app.js"></script>'
    )
