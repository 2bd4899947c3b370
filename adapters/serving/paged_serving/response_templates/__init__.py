"""How models write reasoning and calls of tools, as data: transformers' declarative response templates, read, chosen
and followed. One parser for all models."""
