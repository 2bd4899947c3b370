"""Response templates: models' formats of reasoning and tool calls, as data in transformers' declarative form. One
parser for all models."""
