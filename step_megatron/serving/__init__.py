"""A trained run behind an OpenAI-compatible endpoint: `step-megatron chat --run RUN --serve`.

protocol.py     requests and answers in OpenAI's words
worker.py       the thread that owns the engine, and what a request hears from it
server.py       HTTP on the standard library
"""
