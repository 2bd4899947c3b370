"""An HTTP server: OpenAI's and TGI's routes over an AsyncEngine."""
