"""The server of the page: browsers on this machine reach it, and it connects to no other one."""

import os
import socket
import threading
from typing import Any

from slam_jax.errors import InputError, first_line

HOST = "127.0.0.1"
_MOST_UPLOADED = "64mb"


def open_port(port: int) -> socket.socket:
    """A listening socket; 0 = any port that is free.

    Raises InputError where the port is taken or not allowed.
    """
    listener = socket.socket()
    try:
        if os.name == "posix":  # else the port of a page that just ended counts as taken
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise InputError(
            f"port {port}: {first_line(error)}; give another with --port, or --port=0 for any "
            "that is free"
        ) from error
    return listener


def keep_to_this_machine(files: str) -> None:
    """Sets what gradio reads when it is imported; call it before.

    files: a folder for uploaded pictures.
    """
    os.environ |= {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_TEMP_DIR": files,
    }


def serve(app: Any, listener: socket.socket) -> None:
    """Serves a `gr.Blocks` until the process is interrupted."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from slam_jax.demo.style import CSS, make_theme

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
        theme=make_theme(),
        css=CSS,
    )
    server = uvicorn.Server(uvicorn.Config(pages, log_level="warning"))
    # In the main thread a signal would have to wait for open pages and for compilation.
    thread = threading.Thread(target=server.run, args=([listener],), name="page", daemon=True)
    thread.start()
    thread.join()
