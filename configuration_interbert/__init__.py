from .configuration_interbert import InterBERTConfig

__all__ = ["InterBERTConfig"]
