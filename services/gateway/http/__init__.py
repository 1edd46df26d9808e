"""The gateway's OpenAI-compatible HTTP edge; `app.create_app` is its door."""
