"""The server of the page: browsers on this machine reach it, and it connects to no other one."""

import os
import socket
import threading
from pathlib import Path
from typing import Any

from slam_jax.errors import InputError

HOST = "127.0.0.1"
_MOST_UPLOADED = "64mb"


def open_port(port: int) -> socket.socket:
    """A listening socket; 0 = any port that is free.

    Raises InputError where the port is taken or not allowed.
    """
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise InputError(
            f"port {port}: {os.strerror(error.errno or 0)}; give another with --port, or --port=0 "
            "for any that is free"
        ) from error


def serve(app: Any, listener: socket.socket) -> None:
    """Serves a `gr.Blocks` until the process is interrupted."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from gradio import themes
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # `app.launch()` would choose a port, check the page through the proxy of the environment, and
    # read a dozen environment variables.
    pages = FastAPI(openapi_url=None)
    # A foreign host name may resolve to this machine (DNS rebinding); its pages must not use ours.
    pages.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    gr.mount_gradio_app(
        pages,
        app,
        path="/",
        server_name=HOST,
        server_port=listener.getsockname()[1],
        footer_links=[],
        run_history=False,
        max_file_size=_MOST_UPLOADED,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=themes.Default(
            primary_hue="teal",
            neutral_hue="slate",
            font=("system-ui", "sans-serif"),
            font_mono=("ui-monospace", "monospace"),
        ).set(checkbox_background_color_selected_dark="*primary_600"),
        css_paths=Path(__file__).with_name("style.css"),
    )
    server = uvicorn.Server(uvicorn.Config(pages, log_level="warning"))
    # In the main thread a signal would have to wait for open pages and for compilation.
    thread = threading.Thread(target=server.run, args=([listener],), name="page", daemon=True)
    thread.start()
    thread.join()
