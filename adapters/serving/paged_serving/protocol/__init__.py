"""The protocols: request and response bodies of OpenAI, Anthropic and TGI. No sockets, no threads, no web framework."""
