"""The native inference engine: token ids in, token ids out. It knows nothing of text, HTTP, tools or config files."""
