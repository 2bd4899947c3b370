"""A web server with a thread for each user, as Gradio and Flask have them, and no lock around ``generate``.

    python examples/threaded_server.py --port 8080
    curl -N localhost:8080 -d 'Once upon a time'

The answer is sent as it is written. With stock, such servers keep ``generate`` behind a lock, and users wait in line;
here their rows run in one batch. (For OpenAI's protocol there is ``paged serve``.)
"""

import argparse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

from paged_hf import embedded_folder, paged_generate

LONGEST = 16_384  # bytes of a prompt


class Completions(BaseHTTPRequestHandler):
    model = None
    name = ""
    max_new_tokens = 64

    def do_POST(self):
        size = int(self.headers.get("Content-Length") or 0)
        if not 0 < size <= LONGEST:
            self.send_error(413 if size else 400, f"send a prompt of 1 to {LONGEST} bytes")
            return
        prompt = self.rfile.read(size).decode(errors="replace")
        tokenizer = AutoTokenizer.from_pretrained(self.name)  # of this thread's own: they aren't safe to share
        inputs = tokenizer(prompt, return_tensors="pt")
        if inputs["input_ids"].shape[1] == 0:
            self.send_error(400, "the prompt has no tokens")
            return
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=600)
        kwargs = dict(inputs, streamer=streamer, max_new_tokens=self.max_new_tokens, do_sample=False)
        writer = Thread(target=self.model.generate, kwargs=kwargs)
        writer.start()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.end_headers()
        for piece in streamer:
            self.wfile.write(piece.encode())
            self.wfile.flush()
        writer.join()


def make_server(name: str, port: int, max_new_tokens: int) -> ThreadingHTTPServer:
    model = AutoModelForCausalLM.from_pretrained(name)
    model.generate = paged_generate(model)
    handler = type("Handler", (Completions,), {"model": model, "name": name, "max_new_tokens": max_new_tokens})
    return ThreadingHTTPServer(("127.0.0.1", port), handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()

    server = make_server(args.model or str(embedded_folder()), args.port, args.max_new_tokens)
    print(f"listening on http://127.0.0.1:{server.server_port}; Ctrl-C ends it", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
