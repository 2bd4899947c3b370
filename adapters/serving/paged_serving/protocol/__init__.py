"""What servers say: OpenAI's and TGI's request and response bodies. No sockets, no threads, no web framework."""
