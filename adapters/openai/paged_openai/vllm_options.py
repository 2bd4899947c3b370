"""The options of ``vllm serve``, by what becomes of them here. Data: ``spellings`` makes options of it."""

from __future__ import annotations

SHORT = {"--pipeline-parallel-size": ("-pp",), "--data-parallel-size": ("-dp",),
         "--quantization": ("-q",), "--compilation-config": ("-cc", "-O"), "--speculative-config": ("-sc",),
         "--decode-context-parallel-size": ("-dcp",), "--attention-config": ("-ac",)}  # fmt: skip
ALIASES = {  # vLLM's -> ours
    "--kv-cache-memory-bytes": "--kv-bytes",
    "--no-enable-prefix-caching": "--no-prefix-caching",
    "--enforce-eager": "--no-cuda-graphs",
    "--uvicorn-log-level": "--log-level",
    "--enable-log-requests": "--log-prompts",
    "--enable-log-outputs": "--log-prompts",
    "-tp": "--tensor-parallel-size",
}
DONE_ANYWAY = (  # flags that ask for what is always so, or for what no answer depends on
    "--enable-auto-tool-choice", "--enable-chunked-prefill", "--enable-prefix-caching", "--disable-log-requests",
    "--no-enable-log-requests", "--disable-log-stats", "--disable-uvicorn-access-log", "--enable-prompt-tokens-details",
    "--disable-frontend-multiprocessing", "--no-trust-remote-code", "--enable-request-id-headers",
    "--enable-server-load-tracking", "--exclude-tools-when-tool-choice-none", "--use-v2-block-manager",
    "--disable-custom-all-reduce", "--disable-cascade-attn", "--async-scheduling", "--no-async-scheduling",
    "--disable-hybrid-kv-cache-manager", "--guided-decoding-disable-fallback", "--language-model-only",
    "--skip-mm-profiling", "--interleave-mm-strings", "--disable-chunked-mm-input", "--use-tqdm-on-load",
    "--no-use-tqdm-on-load", "--enable-log-deltas", "--enable-offline-docs", "--multi-step-stream-outputs",
    "--log-error-stack",
    "--trust-remote-code",  # a permission that is not made use of: no code that a model brings is run
)  # fmt: skip
HINTS = (  # with a value: how vLLM loads and schedules, and what it does with images, of which none are read
    "--compilation-config", "--optimization-level", "--performance-mode", "--max-seq-len-to-capture",
    "--max-parallel-loading-workers", "--prefix-caching-hash-algo", "--safetensors-load-strategy",
    "--gdn-prefill-backend", "--limit-mm-per-prompt", "--media-io-kwargs", "--mm-processor-kwargs",
    "--mm-processor-cache-gb", "--allowed-local-media-path", "--allowed-media-domains",
    "--show-hidden-metrics-for-version",
)  # fmt: skip
_REPLICAS = "run a server for each replica, and a balancer before them"
_TEXTS = "models that embed or score texts aren't served"
_HF = "weights are read as transformers reads them"
ONLY: dict[str, tuple[tuple[str, ...], str]] = {  # values that ask for what is always so; what else there is
    "--pipeline-parallel-size": (("1",), "there is no pipeline parallelism"),
    "--decode-context-parallel-size": (("1",), "there is no context parallelism"),
    "--data-parallel-size": (("1",), _REPLICAS),
    "--data-parallel-size-local": (("1",), _REPLICAS),
    "--data-parallel-rank": (("0",), _REPLICAS),
    "--api-server-count": (("1",), _REPLICAS),
    "--distributed-executor-backend": (("mp", "uni"), "ranks are processes of this machine"),
    "--tokenizer-mode": (("auto",), "the model's own tokenizer is used"),
    "--chat-template-content-format": (("auto",), "a chat template gets contents in the form that it reads"),
    "--load-format": (("auto", "safetensors", "hf"), _HF),
    "--config-format": (("auto", "hf"), _HF),
    "--model-impl": (("auto", "transformers"), "models are transformers' own"),
    "--quantization": (("none",), "models come as they were quantised; --dtype and --kv-cache-dtype say the rest"),
    "--cpu-offload-gb": (("0",), "weights stay where the model runs"),
    "--swap-space": (("0", "4"), "K/V go to --kv-host-bytes or --kv-disk"),
    "--response-role": (("assistant",), "answers are the assistant's"),
    "--runner": (("auto", "generate"), _TEXTS),
    "--convert": (("auto", "none"), _TEXTS),
    "--task": (("auto", "generate"), _TEXTS),
    "--guided-decoding-backend": (("auto", "guidance", "llguidance"), "structures are llguidance's"),
    "--preemption-mode": (("recompute",), "what is preempted is computed again, or comes from tiers"),
    "--num-scheduler-steps": (("1",), "steps are scheduled one by one"),
    "--stream-interval": (("1",), "each token is streamed when it is there"),
    "--max-num-partial-prefills": (("1",), "prompts share the tokens of a step: --max-num-batched-tokens"),
    "--max-long-partial-prefills": (("1",), "prompts share the tokens of a step: --max-num-batched-tokens"),
    "--long-prefill-token-threshold": (("0",), "prompts share the tokens of a step: --max-num-batched-tokens"),
    "--logprobs-mode": (("raw_logprobs",), "log-probabilities are the model's, before penalties and temperature"),
    "--allowed-methods": (('["*"]',), "--cors-origin lets an origin do all"),
    "--allowed-headers": (('["*"]',), "--cors-origin lets an origin do all"),
    "--ssl-cert-reqs": (("0",), "--ssl-ca-certs asks clients for a certificate"),
}
_DOWNLOAD = "download it first (hf download MODEL --revision ...), and give its folder as MODEL"
_MERGE = "merge the adapter into the model first (peft: merge_and_unload), and serve that"
_CONFIG = "change config.json in the model's folder"
_TEMPLATE = "--response-template FILE says how calls and reasoning are written"
_PROXY = "put a proxy before the server"
_TIERS = "K/V go to --kv-host-bytes or --kv-disk"
_ONLY_THERE = "it configures what only vLLM has; leave it out"
REFUSED = {
    "--revision": _DOWNLOAD,
    "--download-dir": "set HF_HUB_CACHE in the environment",
    "--hf-token": "set HF_TOKEN in the environment",
    "--tokenizer-revision": "download it first, and give its folder as --tokenizer",
    "--code-revision": "no code that a model brings is run",
    "--config": "write its options on the command line",
    "--speculative-config": "there is no speculation yet",
    **dict.fromkeys(("--enable-lora", "--lora-modules", "--max-loras", "--max-lora-rank", "--lora-dtype",
                     "--max-cpu-loras", "--fully-sharded-loras", "--default-mm-loras"), _MERGE),
    **dict.fromkeys(("--hf-overrides", "--hf-config-path", "--rope-scaling", "--rope-theta"), _CONFIG),
    **dict.fromkeys(("--model-loader-extra-config", "--ignore-patterns", "--pt-load-map-location"), _HF),
    "--override-generation-config": "change generation_config.json in the model's folder",
    "--trust-request-chat-template": "a template is a program; give it as --chat-template",
    **dict.fromkeys(("--tool-parser-plugin", "--reasoning-parser-plugin"), _TEMPLATE),
    "--tool-server": "tools are the client's to run",
    "--return-tokens-as-token-ids": "requests may ask for it by the field of that name",
    "--enable-force-include-usage": "requests may ask for it: stream_options.include_usage",
    "--enable-per-request-metrics": "see the log, /metrics or traces (OTEL_EXPORTER_OTLP_ENDPOINT)",
    "--guided-decoding-disable-any-whitespace": "requests may ask for it: structured_outputs.disable_any_whitespace",
    "--structured-outputs-config": "structures are llguidance's; requests set their white space",
    "--otlp-traces-endpoint": "set OTEL_EXPORTER_OTLP_ENDPOINT in the environment",
    "--collect-detailed-traces": "set OTEL_EXPORTER_OTLP_ENDPOINT in the environment: a span for each request",
    "--log-config-file": "--log-level says how much is logged",
    "--max-log-len": "prompts are logged with --log-prompts only, and then whole",
    "--disable-access-log-for-endpoints": "probes and scrapes are logged at the level debug only",
    "--uds": "give --host and --port",
    **dict.fromkeys(("--middleware", "--ssl-ciphers", "--enable-ssl-refresh", "--allow-credentials",
                     "--disable-fastapi-docs", "--h11-max-header-count"), _PROXY),
    "--h11-max-incomplete-event-size": "--max-body-bytes limits bodies; headers may take 64 KiB",
    "--headless": _REPLICAS,
    **dict.fromkeys(("--data-parallel-address", "--data-parallel-rpc-port", "--data-parallel-backend"), _REPLICAS),
    **dict.fromkeys(("--enable-expert-parallel", "--enable-eplb", "--enable-dbo"), "there is tensor parallelism only"),
    **dict.fromkeys(("--worker-cls", "--worker-extension-cls", "--scheduler-cls", "--logits-processors",
                     "--io-processor-plugin"), "write a plugin (docs/plugins.md)"),
    "--num-gpu-blocks-override": "--kv-bytes says how large the cache is",
    "--disable-sliding-window": "--max-model-len says how long a sequence may be",
    "--no-enable-chunked-prefill": "prompts are always read in chunks: --max-num-batched-tokens",
    "--calculate-kv-scales": "--kv-cache-dtype says what K/V are kept in",
    "--kv-sharing-fast-prefill": "prompts are read whole",
    **dict.fromkeys(("--kv-offloading-size", "--kv-offloading-backend", "--kv-transfer-config",
                     "--ec-transfer-config"), _TIERS),
    "--kv-events-config": "--kv-events says where to tell them",
    **dict.fromkeys(("--pooler-config", "--enable-prompt-embeds", "--skip-tokenizer-init", "--tokens-only"), _TEXTS),
    "--enable-sleep-mode": "stop the server, and start it again",
    "--enable-tokenizer-info-endpoint": "give clients the tokenizer's files",
    **dict.fromkeys(("--attention-config", "--profiler-config", "--additional-config", "--fingerprint-mode"),
                    _ONLY_THERE),
}  # fmt: skip
TOOL_PARSERS = {  # vLLM's -> our response templates
    "hermes": "hermes", "qwen3_coder": "qwen3-xml", "qwen3_xml": "qwen3-xml", "llama3_json": "llama3-json",
    "llama4_pythonic": "llama4-pythonic", "deepseek_v3": "deepseek", "deepseek_v31": "deepseek-v31",
    "openai": "gpt-oss", "granite": "granite3", "granite4": "granite4", "phi4_mini_json": "phi4-mini", "olmo3": "olmo3",
    "glm45": "glm4", "kimi_k2": "kimi-k2", "gemma4": "gemma4",
}  # fmt: skip
_THINK = (
    "hermes", "qwen3-xml", "deepseek", "deepseek-v31", "glm4", "granite3", "granite4", "kimi-k2", "lfm2", "olmo3",
    "phi4",
)  # fmt: skip
REASONING_PARSERS = {  # vLLM's -> our response templates that read reasoning of the same form
    "deepseek_r1": _THINK, "deepseek_v3": _THINK, "qwen3": _THINK, "glm45": _THINK, "olmo3": _THINK, "kimi_k2": _THINK,
    "mistral": ("mistral-args",), "openai_gptoss": ("gpt-oss",), "gemma4": ("gemma4",),
}  # fmt: skip
