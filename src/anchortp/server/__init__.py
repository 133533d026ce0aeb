"""The OpenAI-compatible front end: HTTP in, an `Engine` behind it, text out.

| file | noun |
|---|---|
| `schema.py` | request bodies, checked field by field; nothing is ignored |
| `tokenizer.py` | text to token ids, token ids to bytes |
| `detokenize.py` | token ids to text, piece by piece; stop strings |
| `choice.py` | one answer in the making |
| `generation.py` | one HTTP request in the engine |
| `formats.py` | OpenAI's JSON and SSE |
| `metrics.py` | Prometheus |
| `app.py` | the routes |
| `run.py` | uvicorn, signals, shutting down |

Everything runs in the server process. The engine's thread enters at one place only, the sink in
`generation.py`; all else happens on the event loop.
"""
