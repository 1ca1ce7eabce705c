"""The HTTP server: OpenAI's protocol over schedulers, limits, metrics and a page to try a pair."""
