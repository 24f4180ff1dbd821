"""The server: a model behind HTTP, as the clients of OpenAI's interface expect it, with the inside on request.

served = Served(loaded, "name", Engine(loaded.model, loaded.tokenizer))       what is served, and what requests may do with it
app = create_app(served, key=…)                                               the application (ASGI)
serve(app, port=8000)                                                         run by uvicorn until a signal ends it

bytes ──► gate ──► read ──► prepare ──► Engine ──► tickets ──► answers ──► JSON, or server-sent events
          key, origin       in a thread    its own thread       on the event loop
"""

from .app import create_app
from .limits import Limits
from .running import serve
from .served import Served

__all__ = ["Limits", "Served", "create_app", "serve"]
